# %% [markdown]
# # Find a circuit, and prove it in the model
#
# From a prompt to a claim about the model: which edges carry a prediction, which heads that comes
# down to, and whether the *real* model still makes it with every other edge ablated.
#
# The behaviour is induction: in "A B … A" the model predicts B. Two kinds of heads are known to do
# it: one attends to the previous token and writes down what that was; the others look, from the
# last word, for the place where that word is written down as the previous one, and copy the token
# there.
#
# 1. The circuit of one prompt.
# 2. Is it the model's?
# 3. The circuit of two dozen prompts.
# 4. The heads that it comes down to.
# 5. What each part is worth.
# 6. The same with frozen patterns.

# %%
import random

import tensorlens_tl
from tensorlens_tl import demo, faithfulness, faithfulness_of_many, score_edges
from tensorlens_tl.graph.selection import select

model = demo.load_model()  # a small trained GPT-2 that ships with the package


def without_the_first_mention(pair, rng):
    """The prompt with the first mention of its last word replaced: where to copy from is lost."""
    words = pair.clean.split()
    others = [
        w
        for w in demo.prompts("induction", 1, rng.randrange(99))[0].clean.split()
        if w not in words
    ]
    at = words.index(words[-1])
    return " ".join([*words[:at], rng.choice(others), *words[at + 1 :]])


rng = random.Random(0)
pairs = demo.prompts("induction", 48, seed=3)
clean, answers, foils = ([getattr(p, n) for p in pairs] for n in ("clean", "answer", "foil"))
corrupted = [without_the_first_mention(pair, rng) for pair in pairs]
print(clean[0], "→", answers[0])
print(corrupted[0])

# %% [markdown]
# ## One prompt
# An edge's score is what its reader makes of what its writer adds in this prompt and not in the
# corrupted one. It is read by the operator *between* the two runs, which is exact on their
# difference, queries and keys included: what comes into a head or an MLP goes out of it, and all
# edges out of the tokens sum to the difference between the two prompts, as do all edges into the
# logits. 24 of the 479 edges are 5 %.

# %%
goal = {"target": answers[0], "versus": foils[0]}
_, lens = model.run_with_tensorlens(clean[0])
_, lost = model.run_with_tensorlens(corrupted[0])
gap = [float(one.attribute(**goal).target_value) for one in (lens, lost)]
print(f"{answers[0]} − {foils[0]}: {gap[0]:.2f}, with the place lost {gap[1]:.2f}")
one = lens.discover(**goal, n_edges=24, corrupted=lost)
print(one)
assert gap[0] > 10 > gap[1]

# %% [markdown]
# ## Is it the model's?
# Run the model itself with every edge outside the circuit ablated: each reader's input is rebuilt,
# kept edges from this run, the others from the corrupted prompt's. 1 is the whole model, 0 the
# corrupted run. One prompt's scores may be that prompt's: the next step takes more.

# %%
print(one.faithfulness(model, clean[:1], corrupted[:1], **goal))

# %% [markdown]
# ## Two dozen prompts
# Scores averaged over 24 prompts, the circuit tested on 24 others, with an interval over them.

# %%
circuit = tensorlens_tl.discover(
    model, clean[:24], corrupted[:24], answers[:24], foils[:24], n_edges=24
)
print(circuit)
test = {"corrupted": corrupted[24:], "target": answers[24:], "versus": foils[24:]}
verdict = circuit.faithfulness(model, clean[24:], **test)
print(verdict)
assert circuit.is_connected and verdict.interval[0] > 0.6

# %% [markdown]
# ## The heads
# Attention patterns say which heads look at the previous token, and which look from the last word
# at the word after its first mention. In the circuit the first feeds the *keys* of the others.

# %%
previous, induction = [], []
after_first = lens.tokens[0].index(answers[0])
for layer, block in enumerate(lens.capture.blocks):
    for head, pattern in enumerate(block.attn.pattern[0]):
        if pattern.diagonal(-1)[1:].mean() > 0.5:
            previous.append(f"L{layer}H{head}")
        if pattern[-1, after_first] > 0.5:
            induction.append(f"L{layer}H{head}")
keys = [str(e) for e in circuit.edges if str(e.src) in previous and e.dest.name == "k"]
print("previous token:", *previous, "· induction:", *induction, "· between them:", *keys)
assert any(edge.partition("→")[2].removesuffix(".k") in induction for edge in keys)

# %% [markdown]
# ## What each part is worth
# The same circuit without those key edges; the circuits of equal size that one run's operator finds
# alone, with its patterns frozen and no query and key edges (`at="clean", qk=False`),
# that attribution patching finds (EAP, and with integrated gradients), and a random connected one.

# %%
scores = {
    method: score_edges(model, clean[:24], corrupted[:24], method, answers[:24], foils[:24])
    for method in ("eap", "eap_ig", "random")
}
alone = tensorlens_tl.discover(
    model, clean[:24], corrupted[:24], answers[:24], foils[:24], n_edges=24, qk=False, at="clean"
)
circuits = {
    "the circuit": circuit.edges,
    "without the key edges": [edge for edge in circuit.edges if str(edge) not in keys],
    "operator alone": alone.edges,
} | {name: select(by, lens.operator.wiring, 24) for name, by in scores.items()}
found = faithfulness_of_many(model, clean[24:], circuits, **test)
for name, one in found.items():
    print(f"{one.share:+.2f}  {name}")
assert found["without the key edges"].share < found["the circuit"].share - 0.1
assert found["the circuit"].share > max(found["eap"].share, found["random"].share)

# %% [markdown]
# ## Frozen patterns
# With the clean run's patterns held, query and key edges are no edges. What the patterns alone
# carry is told beside: here it is most of it, since *where* to copy from is all that the corrupted
# prompt lost.

# %%
frozen = faithfulness(model, clean[24:], circuit, attention="frozen", **test)
print(frozen)
assert frozen.empty_share > 0.5
