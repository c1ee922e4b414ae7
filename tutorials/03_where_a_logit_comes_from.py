# %% [markdown]
# # Where a logit comes from
#
# One prompt, one target, one transposed sweep, and every split of it: words, heads by the word they
# read, MLPs, neurons, biases, layers, edges. Each split either sums to the target exactly, and says
# by how much it is off, or says that it does not sum.
#
# All of it decomposes what this run did. Whether the model *needs* a head is another question,
# which only running the model without it answers; the last section does that for one head.
#
# 1. Direct effects: what is written at the last position.
# 2. Total effects: what is written anywhere.
# 3. Edges: through what?
# 4. Who carried it?
# 5. Orders: how deep?
# 6. Two prompts: what makes the difference?
# 7. Many prompts.
# 8. Is it needed?

# %%
import torch

import tensorlens_tl
from tensorlens_tl import demo

model = demo.load_model()  # a small trained GPT-2 that ships with the package
prompt = "When Mary and John went to the store, John gave a drink to"
logits, lens = model.run_with_tensorlens(prompt)
target = {"target": "Mary", "versus": "John"}

# %% [markdown]
# ## Direct effects: what is written at the last position
# Every component's own contribution to the logit difference: embeddings, heads, MLPs, and the
# biases that belong to nobody. They sum to it.

# %%
components = lens.attribute(**target, by="component")
print(components)
gap = float(components.target_value)
assert abs(float(components.values.sum()) - gap) < 1e-3
assert components.completeness_error < 2e-6

# %% [markdown]
# A head's direct effect splits over the words it reads, exactly, since its pattern is frozen.
# `.sum("pos")` puts it together again.

# %%
heads = lens.attribute(**target, by="head")
reads = [(label, value) for label, value in heads.top(20) if "←" in label]
print(*(f"{value:+8.3f}  {label}" for label, value in reads[:6]), sep="\n")
assert '"Mary"@2' in reads[0][0] and reads[0][1] > 0
whole = {
    str(source.node): float(v)
    for source, v in zip(heads.sum("pos").sources, heads.sum("pos").values[0], strict=True)
}
assert all(abs(whole[label] - value) < 1e-4 for label, value in components.top(30))

# %% [markdown]
# MLPs split into neurons, the residual into its dimensions, the stream into layers. A neuron's row
# is what it adds *at this position*; no neuron of this model is more than a few percent of the
# target.

# %%
neurons = lens.attribute(**target, by="neuron").select(kind="neuron")
((label, largest),) = neurons.top(1)
print(f"{len(neurons.sources)} neurons, the largest, {label}, with {largest:.2f} of {gap:.2f}")
assert abs(largest) < 0.1 * gap
for by in ("neuron", "dimension", "layer", "constant"):
    assert lens.attribute(**target, by=by).completeness_error < 2e-6

# %% [markdown]
# ## Total effects: what is written anywhere
# `effect="total"` follows everything above a component, too: ⟨output, covector where it is
# written⟩. This is influence. The totals of different layers overlap, so they do not sum, and the
# result says so.

# %%
totals = lens.attribute(**target, by="component", effect="total").sum("pos")
print(totals)
assert not totals.sums_to_target and totals.completeness_error is None
direct = dict(components.top(50))
total = dict(totals.top(50))
early = max((name for name in total if name.startswith("L0H")), key=lambda name: total[name])
print(f"{early}: direct {direct[early]:+.2f}, total {total[early]:+.2f}")
assert abs(total[early]) > 5 * abs(direct[early])  # it acts through what stands above it

# %% [markdown]
# ## Edges: through what?
# An edge is what one node reads of another's output. The edges into one reader, with the reader's
# own biases, sum to what that reader makes of the target; the edges into the logits sum to the
# target.

# %%
edges = lens.attribute(**target, by="edge")
print(edges)
from_early = edges.select(src=early)
print(f"out of {early}:", *from_early.top(3))
into_logits = edges.select(dest="logits")
assert into_logits.sums_to_target and into_logits.completeness_error < 2e-6
assert abs(float(edges.select(dest="L1H0.v").values.sum()) - total["L1H0"]) < 1e-3

# %% [markdown]
# ## Who carried it?
# The effect of the word at position 2, layer by layer: what each head moved, and what went past all
# of them. Every layer's rows sum to the same effect.

# %%
carried = lens.loadings(2, **target)
print(carried.top(6))
assert torch.allclose(carried.sum("layer").values, carried.target_value, atol=1e-3)

# %% [markdown]
# ## Orders: how deep?
# How many heads and MLPs were passed between a source and the logits.

# %%
orders = lens.attribute(**target, by="order")
print(orders)
assert orders.completeness_error < 2e-6

# %% [markdown]
# ## Two prompts: what makes the difference?
# Against a corrupted prompt of equal length, with one word changed. The tokens' part is read by one
# of the two operators; what the operators themselves changed is one row, and its share is printed,
# as it is often the larger part.

# %%
_, corrupted = model.run_with_tensorlens(prompt.replace(", John", ", Mary"))
difference = lens.attribute(**target, baseline=corrupted)
print(difference)
assert difference.completeness_error < 2e-6
moved = [
    s.pos
    for s, v in zip(difference.sources, difference.values[0], strict=True)
    if s.node.kind == "embed" and abs(v) > 1e-4
]
assert moved == [10]  # only the changed word

# %% [markdown]
# ## Many prompts

# %%
pairs = demo.prompts("ioi", 8)
mean = tensorlens_tl.attribute(
    model, [p.clean for p in pairs], [p.answer for p in pairs], [p.foil for p in pairs]
)
print(mean)
assert mean.n == 8 and mean.target_mean > 0

# %% [markdown]
# ## Is it needed?
# The claim that a head carries the difference is tested on the real model, with that head's output
# set to zero, and nothing frozen.

# %%
name = max((n for n in total if n.startswith("L1H")), key=lambda n: total[n])
layer, head = int(name[1]), int(name[3])


def without(z, hook):
    z[:, :, head] = 0
    return z


ids = [model.to_single_token(word) for word in ("Mary", "John")]
ablated = model.run_with_hooks(prompt, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", without)])
left = (ablated[0, -1, ids[0]] - ablated[0, -1, ids[1]]).item()
print(
    f"{name}: total effect {total[name]:.2f}; "
    f"without it the difference falls from {gap:.2f} to {left:.2f}"
)
assert left < gap
