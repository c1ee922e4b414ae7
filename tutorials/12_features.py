# %% [markdown]
# # From a prediction to its features
#
# A sparse autoencoder (SAE) writes the residual stream as a few features of many. This page trains
# a small one on the bundled model, asks which features a prediction came from, proves one of them
# in the model, and looks at what the SAE leaves out. An SAE from SAELens is loaded with
# `features.load(folder)` in place of the training.
#
# 1. Train a dictionary.
# 2. Which features make the prediction?
# 3. What is the feature about?
# 4. Why did it fire?
# 5. Is it true?
# 6. How many features are enough?
# 7. What the error hides.

# %%
import warnings

import torch

from tensorlens_tl import demo, features

torch.manual_seed(0)
model = demo.load_model()
site = "blocks.2.hook_resid_pre"  # the input of block 2

# %% [markdown]
# ## Train a dictionary
# First the activations: what stands at the site in 900 prompts, prompts of one length at a time.

# %%
by_length = {}
for task in demo.TASKS:
    for pair in demo.prompts(task, 300, seed=1):
        ids = model.to_tokens(pair.clean)[0]
        by_length.setdefault(len(ids), []).append(ids)
seen = []
for ids in by_length.values():
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.stack(ids), names_filter=[site])
    seen.append(cache[site].flatten(0, 1))
x = torch.cat(seen)
print(f"{len(x)} activations of {x.shape[1]} dimensions")

# %% [markdown]
# Then the SAE: 512 features, of which 16 may fire at a position.

# %%
d_in, d_sae, k = x.shape[1], 512, 16
W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1)
parts = {
    "W_enc": W_dec.T.clone(),
    "b_enc": torch.zeros(d_sae),
    "W_dec": W_dec,
    "b_dec": x.mean(0),
}
parts = {name: part.requires_grad_() for name, part in parts.items()}
optimizer = torch.optim.Adam(parts.values(), lr=3e-3)
for _ in range(400):
    rows = x[torch.randint(len(x), (512,))]
    a = (rows - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]
    top = a.topk(k, dim=-1)
    z = torch.zeros_like(a).scatter(-1, top.indices, top.values.relu())
    loss = (z @ parts["W_dec"] + parts["b_dec"] - rows).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.993

sae = features.load(parts, site=site, config={"architecture": "topk", "k": k})
left = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
print(sae)
print(f"variance that it leaves out: {float(left):.1%}")
assert left < 0.2

# %% [markdown]
# ## Which features make the prediction?
# The split is exact: features, `b_dec`, the error and the constants after the site sum to the
# logit difference. It is a split of the model as it is, not of a model with the SAE in it.

# %%
_, lens = model.run_with_tensorlens("The capital of France is")
found = lens.attribute("Paris", versus="Rome", by="feature", saes=sae)
print(found)
assert found.completeness_error < 2e-6
assert found.top(1)[0][0].startswith("L2.pre.error")

# %% [markdown]
# The last line tells how much of Σ|·| is error, which no feature explains. Here it is the largest
# row by far: features alone would tell less than half of the story. `error_shares` tells it by
# position:

# %%
for name, share in features.error_shares(found).items():
    print(name, [f"{float(s):.0%}" for s in share[0]])

# %% [markdown]
# ## What is the feature about?
# The tokens at which it fires most, in prompts that it was not trained on:

# %%
rows = found.sum("pos").select(kind="feature")
best = sae.feature(rows.sources[int(rows.values[0].argmax())].node.index)
fires = []
for task in demo.TASKS:
    for pair in demo.prompts(task, 20, seed=2):
        with torch.no_grad():
            _, cache = model.run_with_cache(pair.clean, names_filter=[site])
        z = sae.encode(cache[site][0])[:, best.index]
        strings = model.to_str_tokens(pair.clean)
        fires += [(float(z[i]), strings[i]) for i in range(len(strings))]
fires.sort(reverse=True)
print(f"feature {best.index}:", [f"{token!r} {size:.1f}" for size, token in fires[:8]])

# %% [markdown]
# ## Why did it fire?
# The feature is a target like a logit. Its tokens and constants sum to its activation.

# %%
z = sae.encode(lens.operator.states()[site])[0, :, best.index]
why = lens.attribute(best, pos=int(z.argmax()))
print(why)
assert why.completeness_error < 2e-6

# %% [markdown]
# ## Is it true?
# Remove the feature wherever it fires, and leave the error as it is. The lens predicts the change
# with patterns, scales and gates held; the model then runs with them live.

# %%
edit = lens.edit("Paris", versus="Rome", along=best, activation=0, positions=None)
check = edit.check(model)
print(check)
assert float(check.predicted) < 0 and float(check.real) < 0

# %% [markdown]
# ## How many features are enough?
# Keep the strongest ten, and set all others of the site to 0. The error stays in both runs, so the
# share is the features' alone.

# %%
order = rows.values[0].abs().argsort(descending=True)[:10].tolist()
kept = [sae.feature(rows.sources[i].node.index) for i in order]
proof = lens.feature_faithfulness(model, sae, kept, "Paris", "Rome")
print(proof)
assert 0 < proof.share < 1

# %% [markdown]
# ## What the error hides
# A worse dictionary explains less, and the split says so: with features of no use it warns.

# %%
noise = {name: torch.randn_like(part) * 1e-3 for name, part in parts.items()}
bad = features.load(noise, site=site, config={"architecture": "topk", "k": k})
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    hidden = lens.attribute("Paris", versus="Rome", by="feature", saes=bad)
print(said[0].message)
assert hidden.completeness_error < 2e-6  # exact all the same
