# %% [markdown]
# # The operator itself
#
# T is a linear map from the embedded prompt to the final residual: a d_model × d_model block for
# every pair of positions. This tutorial opens some of its blocks: what they write, in words; how
# large they are, beside what the attention pattern would make one believe; and their singular
# vectors. All of it is matrix-free, and `lens.plan` tells beforehand what it costs.
#
# 1. A block, applied: what it writes, in words.
# 2. Maps of tokens, beside the attention pattern.
# 3. Where in the depth.
# 4. Singular vectors.
# 5. What it costs.

# %%
import torch

from tensorlens_tl import demo

model = demo.load_model()  # a small trained GPT-2 that ships with the package
logits, lens = model.run_with_tensorlens("The capital of France is")
words = lens.tokens[0]
print(lens, words)


W_U, W_E = model.W_U.detach(), model.W_E.detach()


def decode(y, k=5):
    """The words whose logits a vector of the final residual raises most, all else equal."""
    top = (y @ W_U).topk(k)
    names = [model.tokenizer.decode([i]) for i in top.indices.tolist()]
    return [(name, round(v, 1)) for name, v in zip(names, top.values.tolist(), strict=True)]


# %% [markdown]
# ## A block, applied
# `T[is, France]` is one matrix. It takes France's embedding (word and position) to what France adds
# to the last residual, through every path of every head and MLP at once. Decoded, it is what the
# model knows about the word: its capital first, then its language.

# %%
france = words.index("France")
block = lens.operator.block(query_pos=-1, key_pos=france)[0]  # [d_model, d_model]
written = block @ lens.embedding[0, france]
print(decode(written))
assert decode(written)[0][0] == "Paris"
assert "French" in [word for word, _ in decode(written)]

# %% [markdown]
# The same word's column at *its own* position says another thing: there the model predicts what
# follows "France".

# %%
at_france = lens.operator.block(query_pos=france, key_pos=france)[0] @ lens.embedding[0, france]
print(decode(at_france))
assert decode(at_france)[0][0] != "Paris"

# %% [markdown]
# Read the other way, Tᵀ takes the direction of a logit to what it looks for in the prompt. Of all
# 765 words, at that place, it looks for France.

# %%
paris = W_U[:, model.to_single_token("Paris")] - W_U.mean(1)
looked_for = (W_E @ (block.mT @ paris)).topk(3)
print([model.tokenizer.decode([i]) for i in looked_for.indices.tolist()])
assert model.tokenizer.decode([int(looked_for.indices[0])]) == "France"

# %% [markdown]
# ## Maps of tokens
# Four ways to collapse every block to one number: its size, `norm`; what the embedding makes of it,
# `in`; what the output's direction sees of it, `out`; both, `in_out`, which is signed, and whose
# rows and constants sum to the target exactly.

# %%
maps = {kind: lens.token_matrix(kind) for kind in ("norm", "in", "out")}
maps["in_out"] = lens.token_matrix("in_out", target="prediction")
assert maps["in_out"].completeness_error < 2e-6
attention = torch.stack([block.attn.mix.pattern[0] for block in lens.capture.blocks])
last_rows = {name: matrix[0][-1] for name, matrix in maps.items()}
last_rows |= {
    "attention, mean": attention.mean((0, 1))[-1],
    "last layer": attention[-1].mean(0)[-1],
}
print(f"{'the last row of':>16}", *(f"{word:>8}" for word in words))
for name, row in last_rows.items():
    print(f"{name:>16}", *(f"{value:8.2f}" for value in row.tolist()))

# %% [markdown]
# What T shows and the pattern does not: attention rests on `<bos>` more than on any other word, in
# the last layer with most of its weight, and yet hardly anything of the prediction comes from
# there. A pattern says where heads look; T says what came of it.

# %%
assert int(attention.mean((0, 1))[-1].argmax()) == int(attention[-1].mean(0)[-1].argmax()) == 0
for kind in maps:
    assert int(last_rows[kind].argmax()) == france
assert abs(float(last_rows["in_out"][0])) < 0.1 * float(last_rows["in_out"][france])

# %% [markdown]
# ## Where in the depth
# `layers=` takes the operator from one block to another. Block by block: how large is the part
# that moves something from France to the last position? The first two layers move the word; the
# others only rework it where it has arrived.

# %%
steps = []
for layer in range(4):
    steps.append(float(lens.token_matrix("norm", layers=(layer, layer))[0][-1, france]))
print("block by block:", *(f"{step:.1f}" for step in steps))
assert max(steps[2:]) < 0.1 * min(steps[:2])

# %% [markdown]
# ## Singular vectors
# `svd` finds a block's (or a row's, or the whole operator's) largest singular triples from pushes
# and pulls alone. T is no low-rank table of facts: the block has an effective rank of some 16, and
# the three largest triples carry about half of France → Paris.

# %%
svd = lens.operator.svd(k=model.cfg.d_model, query_pos=-1, key_pos=france)
rank = float(svd.S.square().sum() ** 2 / svd.S.pow(4).sum())
shares = (svd.U[:, 0] @ paris) * svd.S * (svd.V[:, 0] @ lens.embedding[0, france])
order = shares.abs().argsort(descending=True)
print(f"effective rank {rank:.0f} of {len(svd.S)}; France → Paris is {float(shares.sum()):.2f}")
for i in order[:3].tolist():
    sign = torch.sign(svd.V[i, 0] @ lens.embedding[0, france])
    print(
        f"  triple {i}, S = {svd.S[i]:.1f}, share {shares[i]:+.2f}, writes",
        decode(sign * svd.U[i, 0]),
    )
assert 8 < rank < 32
assert abs(float(shares.sum()) - float(paris @ written)) < 1e-3
assert 0.3 < float(shares[order[:3]].sum() / shares.sum()) < 0.8

# %% [markdown]
# ## What it costs
# A plan is arithmetic on shapes and a few measured rates; nothing of the work itself runs.
# `probes=` estimates norms from random vectors, with a standard error of its own.

# %%
print(lens.plan("norm"))
estimate = lens.token_matrix("norm", probes=16)
low, high = (bound[0] for bound in estimate.interval())
exact, past = maps["norm"][0], torch.ones(len(words), len(words)).tril().bool()
inside = ((low <= exact) & (exact <= high))[past]
print(f"{int(inside.sum())} of {len(inside)} exact norms lie in the estimate's 95 % intervals")
assert inside.float().mean() > 0.7

# %% [markdown]
# For long prompts `capture(model, prompt, pattern="recomputed")` keeps queries and keys instead of
# patterns; every question above has the same answer.
