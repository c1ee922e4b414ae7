# %% [markdown]
# # Change a prediction, and check it
#
# The operator predicts what a change of the run does to a prediction, before the model runs. This
# tutorial makes the bundled model say that the capital of France is Rome, in three ways: for one
# prompt, for many prompts by one vector, and in the model's weights. Each time the real model is
# asked whether that is true.
#
# 1. Where would an edit matter?
# 2. The smallest edit, and its check.
# 3. What is to stay as it is.
# 4. One vector for many prompts.
# 5. The fact in the weights.

# %%
import torch

from tensorlens_tl import demo, editing

model = demo.load_model()
prompt = "The capital of France is"
_, lens = model.run_with_tensorlens(prompt)
goal = {"target": "Paris", "versus": "Rome"}
before = float(lens.attribute("Paris", versus="Rome").target_value)
print(f"logit(Paris) − logit(Rome) = {before:.2f}")

# %% [markdown]
# ## Where would an edit matter?
#
# One sweep predicts the best edit of a tenth of what stands at every site and position. The country
# matters early, the last position late. That is where attention moves what is known about it.

# %%
ranking = lens.rank_edits(**goal, by="site", budget=0.1)
print(ranking)
best = {label: abs(value) for label, value in ranking.top(len(ranking.labels))}
assert best["blocks.0.hook_resid_pre@4"] > best["blocks.0.hook_resid_pre@5"]
assert best["blocks.3.hook_resid_pre@4"] < best["blocks.3.hook_resid_pre@5"]

# %% [markdown]
# ## The smallest edit
#
# δ is the shortest vector at the last position that brings the difference to its opposite, while
# patterns, norm scales and gating ratios are held. In the real model these move as well. So the
# prediction is close, and not exact; two corrections by runs of the edited model make up for it.

# %%
edit = lens.edit(**goal, to=-before, site=2)
first, then = edit.check(model, jacobian=True), edit.refine(model).check(model)
print(first)
print(then)
assert then.error < first.error < 0.25
assert then.tops == (("Paris", "Rome"),)

# %% [markdown]
# The model's own gradient says something else: it also differentiates what is held here. For a
# change as large as this one it is further off.

# %%
far = abs(float(first.jacobian - first.real))
near = abs(float(first.predicted - first.real))
print(f"off by {near:.2f} logits; the gradient is off by {far:.2f}")
assert near < far

# %% [markdown]
# ## What is to stay
#
# `keep` holds other logits as they are, in the frozen model exactly. The price is a longer vector.

# %%
kept = lens.edit(**goal, to=-before, site=2, keep=["Madrid", "Berlin"])
moved = [float(lens.effect(kept.delta, name, site=2)) for name in ("Madrid", "Berlin")]
print([f"{x:+.6f}" for x in moved], f"‖δ‖ {float(edit.norm):.2f} → {float(kept.norm):.2f}")
assert max(map(abs, moved)) < 1e-3
assert kept.norm > edit.norm

# %% [markdown]
# ## One vector for many prompts
#
# The country stands two tokens before the end of each of these prompts. One vector there is to
# change all of them by at least what is asked: it is the smallest that does, in the frozen runs.

# %%
leads = ("", "It is true :", "We read this in a book .", "Everyone knows this :")
_, both = model.run_with_tensorlens([f"{lead} {prompt}".strip() for lead in leads])
shared = both.edit(**goal, to=-before, site=0, positions=-2, shared=True).refine(model, rounds=3)
check = shared.check(model, held_out=["The rivers of Kenya flow through"])
print(check)
assert {after for _, after in check.tops} == {"Rome"}

# %% [markdown]
# ## In the weights
#
# The same vector, written into W_out of block 0 where the MLP sees France. The form of this edit of
# rank one is that of ROME (Meng et al. 2022). Now no hook is needed, and phrasings that the edit
# never saw answer with Rome as well. Other countries do not change.

# %%
seen = []
hook = ("blocks.0.mlp.hook_post", lambda t, hook: seen.append(t[0]))
for case in demo.prompts("facts", 40, seed=7):
    model.run_with_hooks(case.clean, fwd_hooks=[hook])
k = torch.cat(seen).detach().double()
moments = k.mT @ k / len(k)


def answer(text: str) -> str:
    return model.tokenizer.decode([int(model(text)[0, -1].argmax())])


phrasings = ["The main city of {} is", "The capital city of {} is called", "{} has its capital in"]
others = ("Spain", "Japan", "Egypt", "Peru")
expected = {c: answer(f"The capital of {c} is") for c in others}
one = lens.edit(**goal, site=0, positions=-2, delta=shared.vector)
with editing.to_weights(one, model, 0, moments):
    rewritten = [answer(phrase.format("France")) for phrase in phrasings]
    unchanged = {c: answer(f"The capital of {c} is") for c in others}
    language = answer("The language of France is")
print(rewritten, unchanged, language)
assert rewritten == ["Rome"] * 3
assert unchanged == expected
assert answer(prompt) == "Paris"  # the weights are as they were

# %% [markdown]
# Other questions about France were not kept, and they change: the last word printed above is what
# the edited model says of the language of France. How often an edit does what was asked, on which
# models it does not, and how it compares with ROME, the Jacobian and others is measured on
# [Edits, tested](../editing).
