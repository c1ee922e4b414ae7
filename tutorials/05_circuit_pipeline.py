# %% [markdown]
# # A circuit over many prompts, in a file
#
# One prompt's circuit may be that prompt's. So take a few hundred, each with a corrupted prompt
# beside it. An edge's score is then the mean of what its reader makes of what its writer adds in
# the prompt and not in the corrupted one. The search keeps its state in a file, so you can stop it
# and go on later.
#
# 1. A search that is interrupted.
# 2. The same search, gone on with.
# 3. Other sizes, other rules.
# 4. What the operator makes along these edges.
# 5. What the model does along these edges.
# 6. The circuit for other tools.

# %%
import json
import tempfile
from pathlib import Path

import tensorlens_tl
from tensorlens_tl import Circuit, demo

model = demo.load_model()  # a small trained GPT-2 that ships with the package
pairs = demo.prompts("ioi", 240, seed=0)
print(pairs[0].clean, "→", pairs[0].answer)
print(pairs[0].corrupted)
clean, corrupted, answers, foils = (
    [getattr(pair, name) for pair in pairs] for name in ("clean", "corrupted", "answer", "foil")
)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "ioi.json"
search = {"n_edges": 40, "batch_size": 24, "path": path}

# %% [markdown]
# ## Interrupted
# Ctrl-C, a machine that goes away: here a hook that has had enough in the middle. Whatever was
# whole is in the file by then, a circuit already.

# %%
runs = 0


def give_up(*_):
    global runs
    runs += 1
    if runs > 12:
        raise KeyboardInterrupt


handle = model.register_forward_pre_hook(give_up)
try:
    tensorlens_tl.discover(model, clean, corrupted, answers, foils, **search)
except KeyboardInterrupt:
    print("interrupted")
handle.remove()
partial = Circuit.from_json(path.read_text())
print(partial)
assert partial.n_prompts == 144 and partial.is_connected

# %% [markdown]
# ## Gone on with
# The same call reads the file, runs what is left, and gives the numbers that one run would have
# given. Another search in the same file is refused.

# %%
circuit = tensorlens_tl.discover(model, clean, corrupted, answers, foils, **search)
print(circuit)
assert circuit.n_prompts == 240 and len(circuit) == 40
try:
    tensorlens_tl.discover(model, clean[:9], corrupted[:9], answers[:9], foils[:9], **search)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Other sizes, other rules
# Every edge's score is kept, so another size or another way to choose needs no run.

# %%
for selection in ("greedy", "absolute", "influence"):
    sizes = [circuit.resized(n_edges=n, selection=selection) for n in (10, 20, 40)]
    heads = [node for node in map(str, sizes[-1].nodes) if "H" in node]
    print(f"{selection}: {len(sizes[-1].nodes)} nodes, heads {', '.join(heads)}")
    assert all(one.is_connected for one in sizes)

# %% [markdown]
# ## What the operator makes along these edges
# On one prompt the circuit restricts the operator: the patterns stay the whole run's, and every
# node reads only what the kept edges bring it. Its share of the logit difference says how much of
# this frozen sum goes along them, and Σ|·| how much cancels on the way; what the *model* would do
# without the other edges, only the model tells.

# %%
logits, lens = model.run_with_tensorlens(clean[0])
for n in (10, 40, 160):
    print(n, lens.circuit(circuit.resized(n_edges=n)).share(answers[0], versus=foils[0]))
whole = lens.circuit(lens.operator.wiring.edges()).share(answers[0], versus=foils[0])
assert abs(whole.share[0] - 1) < 1e-4

# %% [markdown]
# ## What the model does along these edges
# So ask it: on prompts that the search did not see, with every other edge's writer as in the
# corrupted prompt, at several sizes.

# %%
unseen = demo.prompts("ioi", 40, seed=1)
texts, corrupted, right, wrong = (
    [getattr(pair, name) for pair in unseen] for name in ("clean", "corrupted", "answer", "foil")
)
for n in (5, 10, 20, 40):
    verdict = circuit.resized(n_edges=n).faithfulness(
        model, texts, corrupted, target=right, versus=wrong
    )
    print(verdict)
assert verdict.interval[0] > 0.9
record = Path(folder.name) / "verdict.json"
record.write_text(verdict.to_json())  # measures prompt by prompt, share, interval

# %% [markdown]
# ## For other tools
# The file is the edge list that EAP-IG and MIB read, with an entry of our own beside; `to_dot`,
# `to_graphml` and `to_networkx` are for looking at it.

# %%
listed = json.loads(path.read_text())
print(
    len(listed["edges"]), "edges,", sum(row["in_graph"] for row in listed["edges"].values()), "kept"
)
print(circuit.to_dot()[:120], "…")
assert Circuit.from_json(path.read_text()) == circuit
folder.cleanup()
