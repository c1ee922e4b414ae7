# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Distil by the operator
#
# Distillation trains a small model, the student, to give a large model's predictions. The logits
# say *what* the teacher predicts. The operator also says *from which tokens*: the row of token $i$
# is $M_{ij} = u_i^\top T_{ij} x_j$, what token $j$ adds to the teacher's prediction at $i$. Rows
# have token axes alone, so models of other widths and depths can be compared.
#
# 1. A student, and what it has to say before it is trained.
# 2. A lens with a graph: gradients through the operator.
# 3. A plain loop.
# 4. The same as a `transformers.Trainer`.

# %%
import tempfile

import torch
from torch.nn.functional import kl_div
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.distillation import OperatorLoss, rows_of

# %% [markdown]
# ## A student
#
# The teacher is the bundled model: 4 layers, d_model 128. The student has 2 layers, d_model 32, and
# the same words. A Hugging Face model is wrapped first, because the optimizer must hold the weights
# that the wrapped model runs on.

# %%
teacher = demo.load_model().requires_grad_(False)
torch.manual_seed(0)
config = GPT2Config(
    n_layer=2,
    n_head=4,
    n_embd=32,
    n_positions=64,
    vocab_size=teacher.cfg.d_vocab,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
student = tensorlens_tl.wrap(GPT2LMHeadModel(config))
prompts = [pair.clean for pair in demo.prompts("facts", 200)]
ids = [teacher.to_tokens(prompt)[0] for prompt in prompts]
length = max(set(map(len, ids)), key=[len(row) for row in ids].count)
ids = torch.stack([row for row in ids if len(row) == length])[:32]
print(tuple(ids.shape))

# %% [markdown]
# ## A lens with a graph
#
# With `graph=True` everything that the lens gives is a function of the student's weights: the
# patterns, scales and ratios, too. A row of the operator is one pull.


# %%
def run(model, ids):
    """The teacher's and a student's logits and lenses of the same prompts."""
    with torch.no_grad():
        said, held = tensorlens_tl.capture(teacher, ids)
    logits, lens = tensorlens_tl.capture(model, ids, graph=True)
    return said, held, logits, lens


def cosine(model):
    """How alike the rows at the ends of the prompts are."""
    said, held, _, lens = run(model, ids)
    query, tokens = torch.full((1, len(ids)), length - 1), said[:, -1].argmax(-1)[None]
    ours, theirs = rows_of(lens, query, tokens), rows_of(held, query, tokens)
    return float(torch.cosine_similarity(ours, theirs, -1).mean().detach())


before = cosine(student)
said, held, logits, lens = run(student, ids)
loss = OperatorLoss(rows=1)(lens, held)
loss.backward()
print(f"loss {float(loss.detach()):.2f}, cosine {before:.2f}")

# %% [markdown]
# ## A plain loop
#
# One forward pass of the student gives the logits for the divergence, and the lens for the rows. A
# lens describes the weights of its capture: after the optimizer's step it refuses to answer.


# %%
def divergence(ours, theirs):
    """The KL divergence of the student's predictions from the teacher's, in nats."""
    ours, theirs = ours.log_softmax(-1).flatten(0, 1), theirs.log_softmax(-1).flatten(0, 1)
    return kl_div(ours, theirs, log_target=True, reduction="batchmean")


operator = OperatorLoss(maps=1.0, rows=1)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(25):
    said, held, logits, lens = run(student, ids)
    loss = divergence(logits, said) + operator(lens, held, step=step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

after = cosine(student)
assert after > before + 0.2
print(f"cosine {before:.2f} → {after:.2f}")

# %% [markdown]
# ## As a Trainer
#
# `compute_loss` is all that differs. `ramp=(2, 4)` leaves the operator out for two steps: a student
# that predicts nothing yet has no rows worth matching.


# %%
class Distiller(Trainer):
    """Trains on the logits and the operator of a teacher."""

    operator = OperatorLoss(maps=1.0, ramp=(2, 4))

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        said, held, logits, lens = run(model, inputs["input_ids"])
        loss = divergence(logits, said)
        loss = loss + self.operator(lens, held, step=self.state.global_step)
        return (loss, {"logits": logits}) if return_outputs else loss


with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=16,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=1e-3,
    )
    rows = [{"input_ids": row} for row in ids]
    trainer = Distiller(student, options, train_dataset=rows)
    found = trainer.train()

assert found.global_step == 6
last = cosine(student)
assert last > before + 0.2

# %% [markdown]
# What this buys, and what it does not, is measured in
# [Distillation, measured](../distillation).

# %%
with torch.no_grad():
    _, lens = tensorlens_tl.capture(student, ids[:1])
print(lens)
