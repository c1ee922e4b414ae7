# %% [markdown]
# # Find a circuit, and prove it in the model
#
# One prompt, from the operator to a claim about the model: which edges carry the prediction, which two
# heads it comes down to, and whether the *real* model still makes it with everything else ablated.
#
# The behaviour is induction: in "A B … A" the model predicts B. Two heads are known to do it: one
# attends to the previous token and writes down what that was, another looks for the place where the
# present token is written down as the previous one, and copies the token there.

# %%
import torch

import tensorlens_tl
from tensorlens_tl import demo, faithfulness, faithfulness_curve, score_edges

model = demo.load_model()  # a small trained GPT-2 that ships with the package
pair = demo.prompts("induction", 1, seed=3)[0]
print(pair.clean, "→", pair.answer)
print(pair.corrupted, "→", pair.foil)  # one word differs: the one to be copied
logits, lens = model.run_with_tensorlens(pair.clean)
_, corrupted = model.run_with_tensorlens(pair.corrupted)
goal = {"target": pair.answer, "versus": pair.foil}
assert lens.attribute(**goal).target_value > 0 > corrupted.attribute(**goal).target_value

# %% [markdown]
# ## What the operator says
# An edge's score is what its reader makes of what its writer adds in this prompt and not in the
# corrupted one. The operator has frozen the patterns, so query and key edges are added first-order
# (`qk=True`, the default). 24 of 479 edges are 5 %.

# %%
circuit = lens.discover(**goal, n_edges=24, corrupted=corrupted)
print(circuit)
assert circuit.is_connected and len(circuit) == 24

# %% [markdown]
# ## Two heads
# The head that attends to the previous token, and the heads that attend from the last word to the
# word *after* its first mention: their patterns say so, and both kinds are in the circuit.

# %%
n_pos = len(lens.tokens[0])
end, after_first = n_pos - 1, n_pos // 2
previous, induction = [], []
for layer, block in enumerate(lens.capture.blocks):
    for head, pattern in enumerate(block.attn.pattern[0]):
        if pattern.diagonal(-1)[1:].mean() > 0.5:
            previous.append(f"L{layer}H{head}")
        if pattern[end, after_first] > 0.5:
            induction.append(f"L{layer}H{head}")
print("previous token:", *previous, "· induction:", *induction)
assert lens.tokens[0][after_first] == pair.answer
inside = set(map(str, circuit.nodes))
print("in the circuit:", *sorted(inside))
assert inside & set(induction)

# %% [markdown]
# This pair changes the word that is *copied*, so it finds the copying: the way of that word to the
# logits. The way in which the place was *found* is the same in both prompts, and its edges score 0. A
# corrupted prompt in which the present word was never mentioned before asks for the finding.

# %%
words = pair.clean.split()
other = next(w for w in demo.prompts("induction", 1, seed=4)[0].clean.split() if w not in words)
first = words.index(words[-1])
unmentioned = " ".join([*words[:first], other, *words[first + 1 :]])
print(unmentioned)
_, lost = model.run_with_tensorlens(unmentioned)
finding = lens.discover(**goal, n_edges=24, corrupted=lost)
print(finding)
assert lost.attribute(**goal).target_value < 0.2 * lens.attribute(**goal).target_value
