# %% [markdown]
# # First steps: one run of a transformer as one linear map
#
# Freeze three things at the values they took in a run (attention patterns, normalization scales,
# gating ratios act(z)/z) and what is left of the model is *affine* in the embedded prompt:
#
#     y = T · X + c,      logits = y W_U + b_U
#
# `T` is the TensorLens operator (Atad, Zimerman, Katz, Wolf, arXiv 2601.17958). It is exact for
# this run. It is not the Jacobian, which would also differentiate the pattern, the scale and the
# activation; and what it says is a decomposition of the run, not a causal claim.
#
# 1. How exact is that? The check of the capture, and the model's own logits.
# 2. Where a logit comes from.
# 3. The operator as a matrix.
# 4. Many prompts at once.

# %%
import torch

import tensorlens_tl
from tensorlens_tl import demo

model = demo.load_model()  # a small trained GPT-2 that ships with the package
prompt = "When Mary and John went to the store, John gave a drink to"
logits, lens = model.run_with_tensorlens(prompt)
print(lens)

# %% [markdown]
# ## How exact?
# The capture checks itself while it runs: every product the operator will use is compared with the
# run's own activations. `completeness_error` is the whole operator against the model's logits.

# %%
print(f"capture check {lens.capture_check:.0e}, completeness error {lens.completeness_error:.0e}")
y = lens.operator @ lens.embedding + lens.operator.bias
assert torch.allclose(lens.readout(y), logits, atol=1e-3)
assert lens.completeness_error < 2e-6

# %% [markdown]
# ## Where does a logit come from?
# By token: every token's embedding, every position's embedding and every bias, each apart. They sum
# to the target, here the advantage of Mary over John.

# %%
by_token = lens.attribute("Mary", versus="John")
print(by_token)
gap = logits[0, -1, model.to_single_token("Mary")] - logits[0, -1, model.to_single_token("John")]
assert abs(float(by_token.values.sum() - gap)) < 1e-3
assert by_token.top(1)[0][0] == '"Mary"@2'

# %% [markdown]
# By component: what each head, each MLP and each bias writes straight to the logits.

# %%
by_component = lens.attribute("Mary", versus="John", by="component")
print(by_component)
assert abs(float(by_component.values.sum() - gap)) < 1e-3

# %% [markdown]
# ## The operator as a matrix
# It is never held in memory unless asked for: it is applied, transposed, cut into blocks. The block
# T[query, key] is how the token at `key` enters the prediction at `query`.

# %%
block = lens.operator.block(query_pos=-1, key_pos=2)[0]  # [d_model, d_model]; multiplies a column
W_U = model.W_U.detach()
direction = W_U[:, model.to_single_token("Mary")] - W_U[:, model.to_single_token("John")]
mary = lens.capture.embed[0, 2]  # the embedding of "Mary", without its position's
effect = float(direction @ block @ mary)
print(f"Mary's embedding through T[−1, 2] onto Mary − John: {effect:.3f}")
assert abs(effect - dict(by_token.top(1))['"Mary"@2']) < 1e-3

# %% [markdown]
# The rest of the stream: the operator between any two residual sites, and its adjoint.

# %%
middle = lens.between("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")
assert tensorlens_tl.dot_test(middle) < 1e-6
pulled = middle.T @ torch.randn_like(lens.embedding)
assert pulled.shape == lens.embedding.shape

# %% [markdown]
# ## Many prompts
# A list of strings is padded and masked by the model; positions count over real tokens, so −1 is
# each prompt's last word.

# %%
_, batch = model.run_with_tensorlens([prompt, "The capital of France is"])
attribution = batch.attribute()  # each prompt's own prediction
print(attribution[1])
assert attribution.target == ("'Mary'", "'Paris'")
assert attribution.completeness_error < 2e-6
