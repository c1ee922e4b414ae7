# %% [markdown]
# # Is it true? Three maps of one prompt, and the model's own verdict
#
# Many methods draw a map of which word is in which: attention rollout, norms of moved values, the
# operator's own `in_out`. The maps differ, and a map that looks right proves nothing. But each one
# also says which words the prediction *needs*, and that can be tested: mask those words, run the
# real model again, and see what is left of the prediction.
#
# 1. The maps, side by side.
# 2. What each says about this prediction.
# 3. What the model says.
# 4. Where the operator loses.

# %%
import torch

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.evaluation.runner import evaluate
from tensorlens_tl.methods.registry import METHODS

model = demo.load_model()  # a small trained GPT-2 that ships with the package
prompt = "When Mary and John went to the store, John gave a drink to"
logits, lens = model.run_with_tensorlens(prompt)
answer = model.tokenizer.decode([int(logits[0, -1].argmax())])
methods = ("in_out", "rollout", "last_layer_attention")
print(f"{lens}\nprediction: {answer!r}; {len(METHODS)} methods: {', '.join(METHODS)}")
assert answer == "Mary"

# %% [markdown]
# ## The maps, side by side
# Row: where; column: which word is in it. Every method has the same call and gives the same kind of
# matrix; `in_out` is signed, so its size is drawn.


# %%
def shade(matrix):
    """A matrix as characters, each row by its own largest entry."""
    part = matrix.abs() / matrix.abs().amax(-1, keepdim=True)
    return ["".join(" ░▒▓█"[min(4, int(5 * value))] for value in row) for row in part.tolist()]


words = lens.tokens[0]
maps = {"in_out": lens.token_matrix("in_out", "prediction")}
maps |= {name: lens.token_matrix(name) for name in methods[1:]}
width = max(len(words) + 2, *map(len, methods)) + 2
print(" " * 8 + "".join(f"{name:<{width}}" for name in methods))
for word, *rows in zip(words, *(shade(maps[name][0]) for name in methods), strict=True):
    print(f"{word:>7} " + "".join(f"{row:<{width}}" for row in rows))
assert all(maps[name][0].shape == (len(words), len(words)) for name in methods)

# %% [markdown]
# ## What each says about this prediction
# The last row, for a target: a token's score. `in_out` takes the prediction's own direction, and
# its scores are shares of a logit; the others know no target.

# %%
scores = {name: lens.token_scores(name)[0] for name in methods}
for i, word in enumerate(words):
    print(f"{word:>7} " + "  ".join(f"{name} {float(s[i]):+8.3f}" for name, s in scores.items()))
best = {name: words[1 + int(s[1:-1].argmax())] for name, s in scores.items()}
print("most needed word before the last, by each:", best)
assert best["in_out"] == "Mary"

# %% [markdown]
# ## What the model says
# Take away the word that a method ranks first, then the next, up to 30 % of them (the last word
# stays, as the prediction is made there), and run the model each time. The better a method knows
# what the model needs, the faster the probability of "Mary" falls: `positive` is the area under
# that curve, lower is better. `negative` takes the least needed first; there higher is better.

# %%
one = evaluate(model, [prompt], methods, keep_last=True)
print(one)
found = {name: one.row(name, "positive").values[0] for name in methods}
assert min(found, key=found.get) == "in_out"

# %% [markdown]
# One prompt is an anecdote. Held-out prompts of the same task, two ways of masking, intervals, and
# a paired test:

# %%
prompts = [pair.clean for pair in demo.prompts("ioi", 16, seed=3)]
many = evaluate(
    model,
    prompts,
    (*methods, "random"),
    ["perturbation", "leave_one_out"],
    ["delete", "token"],
    keep_last=True,
)
print(many)
for other in (*methods[1:], "random"):
    gap = many.compare("in_out", other, "positive", "delete")
    print(f"positive, deleted: in_out is better than {other} by {gap}")
    assert gap.difference.low > 0 and gap.p < 0.05

# %% [markdown]
# ## Where it loses
# Not everywhere. Agreement with leave-one-out ranks *all* words, also those that hardly matter, and
# a signed score ranks last what speaks for another answer ("John"), whose loss hurts all the same.

# %%
loo = {name: many.estimate(name, "leave_one_out", "delete") for name in (*methods, "random")}
print(*(f"{name:>22}: {found}" for name, found in loo.items()), sep="\n")
assert loo["rollout"].value > loo["random"].high
sizes = {
    "|in_out|": [
        tensorlens_tl.capture(model, text)[1].token_scores("in_out")[0].abs() for text in prompts
    ]
}
signless = evaluate(model, prompts, None, "leave_one_out", scores=sizes, keep_last=True)
unsigned = signless.estimate("|in_out|")
print(f"{'without signs':>22}: {unsigned}")
assert unsigned.value > loo["in_out"].value

# %% [markdown]
# And a probability falls with whatever breaks the sentence. Which words decide *between* the
# prediction and its runner-up? Ask `in_out` for that, and measure that: the logit difference. A
# method made of attention alone has no target to ask for.

# %%
choice = evaluate(
    model,
    prompts,
    methods,
    "leave_one_out",
    versus="runner_up",
    metric="logit_diff",
    keep_last=True,
)
print(choice)
for other in methods[1:]:
    gap = choice.compare("in_out", other, "leave_one_out")
    print(f"in_out agrees better than {other} by {gap}")
    assert gap.difference.low > 0

# %% [markdown]
# Which method wins depends on the model, the task and the way of masking: `docs/results.md` has all
# of them, also where the operator's own maps lose. An evaluation is a file, and comes back whole:

# %%
again = type(many).from_json(many.to_json())
assert repr(again) == repr(many)
assert torch.equal(torch.tensor(again.rows[0].values), torch.tensor(many.rows[0].values))
