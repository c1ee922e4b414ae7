# %% [markdown]
# # Why is this digit a 3?
#
# A small vision transformer learns handwritten digits here, in less than a minute on one core. Then
# a class logit is split by the patches of a picture, and the split is tested in the model. The
# pictures are scikit-learn's 1,797 digits of 8 × 8 pixels: `pip install scikit-learn`.
#
# 1. Train the model.
# 2. Which patches?
# 3. Which heads?
# 4. Is it true?

# %%
import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import tensorlens_tl
from tensorlens_tl.evaluation import evaluate

torch.manual_seed(0)
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
classes = torch.tensor(digits.target)
order = torch.randperm(len(pixels))
train, held_out = order[:1297], order[1297:]

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    id2label={i: str(i) for i in range(10)},
)
hf = ViTForImageClassification(config)
optimizer = torch.optim.AdamW(hf.parameters(), lr=2e-3)
for _ in range(20):  # epochs
    for batch in train[torch.randperm(len(train))].split(64):
        loss = torch.nn.functional.cross_entropy(hf(pixels[batch]).logits, classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
hf = hf.eval()
with torch.no_grad():
    guesses = hf(pixels[held_out]).logits.argmax(-1)
right = float((guesses == classes[held_out]).float().mean())
print(f"{right:.1%} of {len(held_out)} pictures that it did not learn from are right")
assert right > 0.9

# %% [markdown]
# ## Which patches?
# One picture of a 3, and what speaks for "3" and against "8". Every patch is a row; so are [CLS],
# the positions and the biases, and all rows sum to the difference of the two logits.

# %%
of_3 = held_out[(classes[held_out] == 3) & (guesses == 3)][:8]
logits, lens = tensorlens_tl.capture(hf, pixels[of_3])
found = lens[0].attribute("3", versus="8")
print(found)
assert found.completeness_error < 1e-5


# %%
def drawn(grid):
    """Numbers as characters, the largest darkest."""
    part = (grid - grid.min()) / (grid.max() - grid.min())
    return ["".join(" ░▒▓█"[min(4, int(5 * x))] * 2 for x in row) for row in part.tolist()]


print("the picture        what speaks for 3 and against 8")
patches = found.select(kind="patch").grid()[0]
as_pixels = patches.repeat_interleave(2, 0).repeat_interleave(2, 1)
for picture, share in zip(drawn(pixels[of_3[0], 0]), drawn(as_pixels), strict=True):
    print(f"{picture}   {share}")
assert patches.shape == (4, 4)

# %% [markdown]
# ## Which heads?

# %%
by_component = lens[0].attribute("3", versus="8", by="component")
print(by_component)

# %% [markdown]
# ## Is it true?
# Mask the patches that a method ranks first, and run the model on what is left. `positive` is the
# area under the falling probability: the lower, the better the method knows what the model needs.

# %%
model = tensorlens_tl.wrap(hf)
some = held_out[guesses == classes[held_out]][:60]
report = evaluate(model, pixels[some], ["in_out", "rollout", "random"], masking=["mean"])
print(report)
gap = report.compare("in_out", "random", "positive")
print(f"in_out is better than chance by {gap}")
assert gap.difference.low > 0 and gap.p < 0.05
