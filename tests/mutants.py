"""Deliberate faults in the library, and a check that the tests notice every one of them.

    python tests/mutants.py                    all faults, the whole suite
    python tests/mutants.py --core             the same, with the tests marked "core" alone
    python tests/mutants.py --only NAME ...    some faults
    python tests/mutants.py --tests PATH ...   these tests alone
    python tests/mutants.py --before DIR       another checkout: its package and its tests
    python tests/mutants.py --list             what is wrong with each, and where; runs nothing

A fault is a piece of the library's text and what stands in its place. The text is searched in all
files of the package and must be there exactly once. Only its words and signs count, not its spaces,
line breaks and trailing commas, so it is found again after files are moved or reformatted.

1. Find the place of every fault. Stop if one is not found exactly once.
2. Copy the checkout to a temporary folder, put one fault in, and run pytest there until the first
   failure: first the test files that the fault's words name, then the whole suite.
3. Run the test that failed once more, without the fault. A test that fails there, too, proves
   nothing: it is named, left out from then on, and the suite goes on.
4. Print one line for the fault: caught or SURVIVED, after how many seconds, by which test.

The words only choose which files run first. They hide nothing: the suite must catch the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = "tensorlens_tl"
CORE_SHARE = 0.9
"""Share of the faults that the core tests must catch."""
LEFT_OUT = (
    ".git",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".venv*",
    "*.egg-info",
    "build",
    "_build",
)
TOO_LONG = "no test: it ran longer than --limit"
NO_IMPORT = "no test: the package could not be imported"
NOTES = """
def pytest_runtest_logreport(report):
    if report.failed:
        with open(__file__ + ".txt", "a", encoding="utf-8") as file:
            file.write(report.nodeid + "\\n")

pytest_collectreport = pytest_runtest_logreport
"""
"""A plugin of pytest that notes the names of failed tests, as its summary cuts them off."""

FAULTS = r"""
# name (words of test files that run first): what is wrong
#     the library's text ⇒ the fault
# Where two checkouts differ, a second line of that kind has the other's text.

# --- Biases and weights
b_v_left_out (granularity attribution): W_O reads mixed values without b_V.
    self.mix.apply(self.values.apply(x) + self.values.bias) ⇒ self.mix.apply(self.values.apply(x))
b_v_outside_pattern (edits sublayers recomputed): b_V is added whole, though a row sums to less.
    row.sum(-1, keepdim=True) * frame.cast(w.b_V) ⇒ frame.cast(w.b_V)
b_o_left_out (operator sublayers): Attention adds no b_O.
    Linear(self.frame, W_O, self.weights.b_O, ⇒ Linear(self.frame, W_O, None,
b_o_in_every_head (sublayers paths): Every head's part holds b_O, which is counted outside, too.
    W_O=w.W_O[h : h + 1], b_O=None, ⇒ W_O=w.W_O[h : h + 1], b_O=w.b_O,
b_out_left_out (operator sublayers): MLPs add no b_out.
    self.weights.W_out, self.weights.b_out, ⇒ self.weights.W_out, None,
b_in_left_out (operator sublayers): Plain MLPs read without b_in.
    Linear(self.frame, w.W_in, w.b_in, ⇒ Linear(self.frame, w.W_in, None,
norm_b_left_out (operator sublayers): A frozen norm has no b.
    self.frame.zeros(self.width) if b is None else self.frame.spread(b) ⇒
    self.frame.zeros(self.width)
w_o_transposed (operator sublayers): z is multiplied by the transpose of W_O.
    self.weights.W_O.flatten(0, 1) ⇒ self.weights.W_O.flatten(0, 1).T
norm_gain_skipped_in_edges (qk_edges graph attribution): Readers of edges skip the norm's weight.
    y *= self.frame.cast(self.weights.gain) ⇒ y *= 1.0
norm_gain_skipped_in_sweeps (contraction): Sweeps of many vectors skip the weight of a norm.
    W if gain is None else W * norm.frame.cast(gain)[:, None] ⇒ W
grouped_heads_mixed_up (sublayers operator): The pattern's heads go to the wrong key/value groups.
    "b (g r) q k -> b g (r q) k" ⇒ "b (r g) q k -> b g (r q) k"
recomputed_head_takes_other_key (recomputed): A head of a recomputed pattern takes another's keys.
    index // self._repeat ⇒ index % self.kv_heads
embedding_scale_forgotten (differences masking): The mean embedding lacks the scale of Gemma.
    scale * weights.mean(exact) ⇒ weights.mean(exact)

# --- Gated MLPs and activations
gate_choice_ignored (sublayers operator): A capture holds act(gate) whatever was asked for.
    GatedMLP(frame, layer, w, pre, up, recorder.convention.gate) ⇒
    GatedMLP(frame, layer, w, pre, up, "gate")
wrong_branch_frozen (sublayers operator): "up" holds the gate where it should hold u.
    ratio * self.pre_linear ⇒ ratio * self.pre
gelu_as_tanh (sublayers operator): The exact GELU has the ratio of its tanh form.
    0.5 * (1 + torch.erf(z / math.sqrt(2))) ⇒ _tanh_gelu(z)
relu_at_zero (sublayers properties): ReLU's ratio is 1 at 0.
    lambda z: (z > 0).to(z.dtype) ⇒ lambda z: (z >= 0).to(z.dtype)
silu_of_wrong_sign (sublayers operator): SiLU's ratio is taken at −z.
    "silu": torch.sigmoid, ⇒ "silu": lambda z: torch.sigmoid(-z),
soft_cap_derivative (sublayers targets): A soft cap is held at its derivative, not at its ratio.
    torch.tanh(t) / torch.where(t == 0, 1, t) ⇒ 1 - torch.tanh(t).square()

# --- Positions, padding, windows
left_padding_counts (padding): Padding before a prompt counts as real.
    (pos >= start[:, None]) & (pos < stop[:, None]) ⇒ pos < stop[:, None]
last_position_is_padding (padding targets): −1 is the last column, not the prompt's last token.
    (stop if pos < 0 else start) + pos for ⇒ (self.n_pos if pos < 0 else start) + pos for
left_padded_text_unmasked (tokenizers padding): Texts padded on the left run without their mask.
    elif not (mask if adapter.attends_ahead else mask[:, 0]).all() or ( ⇒ elif (
attention_to_padding_accepted (padding guards): A real token that attends to padding is not refused.
    if not rehearsed() and bool((pattern * padding_keys).any()): ⇒ if False:
padding_row_kept (padding attribution): A prompt's table keeps the row of padding after it.
    if s.pos is None or start <= s.pos < stop ⇒ if s.pos is None or start <= s.pos <= stop
causal_slice_off_by_one (contraction): Sweeps skip what stands on the diagonal where a tile begins.
    slice(first if causal else 0, n) ⇒ slice(first + 1 if causal else 0, n)
    slice(first if self.causal else 0, n) ⇒ slice(first + 1 if self.causal else 0, n)
window_one_too_wide (recomputed contraction): A sliding window lets one key more into sweeps.
    hidden | (behind >= scores.window) ⇒ hidden | (behind > scores.window)
alibi_slopes_beyond_powers (more_families): Heads beyond a power of 2 repeat the first ones' slopes.
    i / (2 * n) for i in range(1, 2 * n, 2) ⇒ i / (2 * n) for i in range(2, 2 * n + 1, 2)

# --- Self-check, refusals, caches, hooks
self_check_skips_residual (capturing guards): The sum of a block's branches is not checked.
    self.check.residual( ⇒ (lambda *_: None)(
change_in_place_accepted (edits guards): A hook may write over what was read, unseen.
    if version(source) != seen: ⇒ if version(source) < seen:
stale_lens_answers (guards capturing): A lens answers after the model's weights were changed.
    if (tensor := self.writes.written()) is not None: ⇒ if (tensor := None) is not None:
    if version(tensor) != seen: ⇒ if version(tensor) < seen:
uncounted_write_passes (writes): A lens does not notice a write that torch does not count.
    if not _equal(now, seen): ⇒ if now.isnan().all():
row_apart_is_missed (writes): Steps through a weight are so long that rows are passed over.
    columns if rows <= 8 * columns else 8 * columns ⇒ 64 * columns
wrong_sum_is_shown (guard): A split is shown whose rows do not sum to its target.
    if bool((off <= share).all()): ⇒ if bool((off >= 0).all()):
final_norm_not_watched (writes guards): A lens does not notice that ln_final alone was changed.
    getattr(self.ln_final, "weights", None) ⇒ None
known_products_survive (capturing guards): An edit through .data is checked with the old products.
    self._known.clear() self._names, self._errors, ⇒ self._names, self._errors,
target_of_same_name_reused (attribution targets): Another position's sweep is taken for this one's.
    others.keys()) and all( ⇒ others.keys()) or all(
    .name and all( ⇒ .name or all(
hooks_stay_after_error (guards capturing): The recorder's hooks stay when the run fails.
    for handle in handles: ⇒ for handle in handles if "logits" in locals() else ():
autocast_accepted (guards precision): Autocast is not refused.
    if kind != "meta" and torch.is_autocast_enabled(kind): ⇒ if False:
logit_scale_ignored (more_families): The scale of logits is not folded into W_U.
    self.multiplied("logit_scale", weights) ⇒ weights
memory_limit_ignored (contraction): Work that cannot fit the memory limit is not refused.
    if (least := worst(many)) > limit: ⇒ if (least := worst(many)) < 0:

# --- Files
damaged_values_accepted (saving): Values of a file are not compared with their fingerprint.
    if not agree(node["products"], products(tensor)): ⇒ if False:
other_model_attached (saving): Weights of other values are attached to a saved lens.
    elif not agree(saved["products"], ⇒ elif False and not agree(saved["products"],
stored_shapes_unchecked (saving): Shapes in a file are not held to the annotations.
    _check_shape(value, hint, path, sizes) ⇒ pass
circuit_of_other_weights (circuits): A circuit of a model with other weights is accepted.
    other.fingerprint and self.fingerprint != other.fingerprint ⇒ False
baseline_of_other_model (differences): A baseline from another model is accepted.
    or not all(map(_equal, *weights)) ⇒ or False
resume_of_other_search (discovery): A search goes on from the file of another one.
    own = question == self.digest ⇒ own = True
resume_counts_twice (discovery): A search that goes on takes the first prompts again.
    for start in range(n, len(work), batch_size): ⇒ for start in range(0, len(work), batch_size):
running_mean_of_batch (discovery): Every batch counts as if it were the only one.
    (stop - n) * means) / stop ⇒ (stop - n) * means) / (stop - n)
sem_of_biased_variance (datasets): The standard error divides by n where n − 1 is due.
    (squares / (n - 1) / n).sqrt() ⇒ (squares / n / n).sqrt()
    (self.squares / (self.n - 1) / self.n).sqrt() ⇒ (self.squares / self.n / self.n).sqrt()

# --- Attribution
versus_adds_b_u (targets attribution): b_U of the other token is added, not subtracted.
    constants[name] = a - b ⇒ constants[name] = a + b
    , self.constant - ⇒ , self.constant +
many_targets_one_position (attribution): Targets of several positions are pulled at the first's.
    query if same else None ⇒ query
orders_off_by_one (granularity): Constants of nodes are of order 0, and those of none of order 1.
    grown[0 if name in outside else 1] ⇒ grown[1 if name in outside else 0]
total_effect_read_early (granularity attribution): Outputs are read before the step that wrote them.
    zip(steps, trace.written, covectors[1:], ⇒ zip(steps, covectors, covectors[1:],
    for step, c in zip(steps, covectors[1:], ⇒ for step, c in zip(steps, covectors,
queries_and_keys_swapped (qk_edges): What is due to queries is given to keys.
    dP @ keys, dP.mT @ queries ⇒ dP.mT @ queries, dP @ keys
score_scale_forgotten (qk_edges): Query and key edges lack the factor of the scores.
    A * (dA - (A * dA).sum(-1, keepdim=True)) * w.scale ⇒
    A * (dA - (A * dA).sum(-1, keepdim=True))
rotation_done_twice (qk_edges secant): A rotation is done again where it should be undone.
    -_quarter(x * sin, rotation) if back ⇒ _quarter(x * sin, rotation) if back
edge_of_wrong_reader (qk_edges): Queries and keys read a step's target from below it.
    trace.pulls, below, trace.written ⇒ trace.pulls, below, trace.covectors
    trace.pulls, below, trace.covectors[1:], ⇒ trace.pulls, below, trace.covectors,
parallel_mlp_reads_heads (circuits): An MLP reads the heads beside it in a parallel block.
    reader.kind != "head" and not self.parallel ⇒ reader.kind != "head"
    reader.kind == "mlp" and not self.parallel ⇒ reader.kind == "mlp"
loadings_past_lacks_mlp (differences): "past" lacks the MLP beside the heads.
    past = past + _dot(state, pull.covector) ⇒ past = past
secant_softmax_plain_mean (secant): The softmax's secant takes the plain mean, not the logarithmic.
    L = log_mean_exp(log_A, log_B) ⇒ L = (log_A.exp() + log_B.exp()) / 2
secant_product_sum (secant): The product's secant takes both runs' factor twice: no mean, the sum.
    (ups[0] + ups[1]) / 2 ⇒ (ups[0] + ups[1])
    (ours.pre_linear + theirs.pre_linear) / 2 ⇒ (ours.pre_linear + theirs.pre_linear)
completeness_understated (operator): The completeness error is the smallest error.
    float(((ours - logits).abs().max() ⇒ float(((ours - logits).abs().min()
    float((ours - logits).abs().max() / logits ⇒ float((ours - logits).abs().min() / logits
probe_error_too_large (contraction methods): The probes' error ignores that they are orthogonal.
    math.sqrt((1 - k / ⇒ math.sqrt((1 - 0 * k /
path_bound_too_small (paths): The bound squares a head's weights where paths are summed.
    A * A if by_position else A * (A @ t)[:, None] / t ⇒ A * A
stopped_search_claims_exact (paths): A search that its budget stopped calls itself exact.
    search.cut <= best.threshold ⇒ True
    not heap or -heap[0][0] <= best.threshold ⇒ True

# --- Circuits
circuit_one_edge_short (circuits discovery): A circuit never reaches the size asked for.
    len(self.edges) + len(chain) <= self.size ⇒ len(self.edges) + len(chain) < self.size
dead_end_connected (circuits): An edge that leads nowhere counts as connected.
    e.src in reached and owner(e.dest) in needed ⇒ e.src in reached or owner(e.dest) in needed
constants_without_path_kept (circuits): Constants of nodes that are left out stay.
    everywhere + constant(branch.outside) ⇒ everywhere + constant(branch.map.constants)
zero_ablation_by_mean (interventions): Ablation by zero takes the mean.
    ablation == "mean" and other is None: ⇒ ablation != "resample" and other is None:
    ablation == "mean" else None ⇒ ablation != "resample" else None
ablated_by_nothing (interventions): Nothing stands in for what is ablated, whatever was asked for.
    (1 - keep) @ ⇒ (0 * keep) @
packed_change_is_the_whole (packed): What a packed circuit changes lacks what is replaced.
    made if replaced is None else made - replaced ⇒ made
packed_prefix_too_long (packed): The first token at which two prompts differ is not run.
    nonzero()[:1, 0].tolist(), len(row) - 1 ⇒ nonzero()[1:2, 0].tolist(), len(row) - 1
packed_eap_ig_starts_corrupted (packed): The points of EAP-IG lack the clean run, packed.
    self.twin + step / steps * ⇒ self.twin + (step - 1) / steps *
packed_norm_held (packed): First-order effects hold the scale of the norm before attention.
    out -= (c @ torch.stack([p["x"] for p in points], 1)).transpose(0, 1) ⇒ pass
packed_pass_unchecked (packed): Packed runs are not compared with the host's own logits.
    same = bool((own - logits).abs().max() <= eps**0.5 * own.abs().max()) ⇒ same = True
frozen_patterns_live (interventions): Frozen patterns are live, and live ones frozen.
    clean.A if self.frozen else None ⇒ clean.A if not self.frozen else None
    if self.frozen else None ⇒ if not self.frozen else None
grouped_copies_take_first_key (interventions): Every query head takes its group's first head's key.
    each[head % self.copies, head] ⇒ each[head * 0, head]
    each[head % self.copies, :, :, head] ⇒ each[head * 0, :, :, head]
share_of_the_whole (interventions): The share is of the full measure, not of what ablation takes.
    (circuits.mean(-1) - ablated.mean()) / gap ⇒ (circuits.mean(-1) - ablated.mean()) / full.mean()
share_interval_of_90 (interventions): The share's interval covers 90 %, not 95 %.
    new_tensor([0.025, 0.975]) ⇒ new_tensor([0.05, 0.95])
eap_ig_starts_corrupted (baselines_edges): The points of EAP-IG lack the clean run.
    step / steps * (clean[0] ⇒ (step - 1) / steps * (clean[0]

# --- Evaluation
lerf_is_morf (protocols): "Least relevant first" masks the most relevant first.
    order[::-1] if self.least_first else order ⇒ order
aopc_counts_nothing_masked (protocols): AOPC's mean counts the unmasked prompt, too.
    return clean - _mean(values) ⇒ return clean - _mean([clean, *values])
one_sided_p (evaluation protocols): The permutation test counts one side alone.
    (signs.to(d) @ d).abs() >= least ⇒ (signs.to(d) @ d) >= least
ties_share_least_rank (protocols evaluation): Equal values share their least rank, not the mean.
    below + (equal + 1) / 2 ⇒ below + 1.0
log_odds_is_log_p (masking evaluation): Log-odds count the target among the others.
    logits.scatter(1, target[:, None], -torch.inf).logsumexp(-1) ⇒ logits.logsumexp(-1)
bos_masked (evaluation masking): The beginning-of-sequence token may be masked.
    range(int(bos is not None and int(prompt[0]) == bos), ⇒ range(0,
    start = int(bos is not None and int(ids[0]) == bos) ⇒ start = 0
interval_of_90 (evaluation relations): Bootstrap intervals cover 90 %, not 95 %.
    for q in (0.025, 0.975) ⇒ for q in (0.05, 0.95)

# --- Earlier methods
rollout_without_residual (baselines methods): Rollout forgets the half of the residual.
    0.5 * rows(capture, matrix) + 0.5 * identity(capture) ⇒ rows(capture, matrix)
attnlrp_half_at_pattern (baselines_gradient): AttnLRP gives patterns half where a quarter is due.
    "pattern": lambda _: 0.25 ⇒ "pattern": lambda _: 0.5
ig_mean_over_prompts (baselines_gradient): The mean baseline is over prompts, not over tokens.
    x.mean(1, keepdim=True).expand_as(x) ⇒ x.mean(0, keepdim=True).expand_as(x)
value_zeroing_mlp_not_rerun (baselines): In value zeroing the MLP reads what it read in the run.
    (block.ln2, mid, mid + change) ⇒ (block.ln2, mid, mid)

# --- Relations and validity
relation_sums_maps (relations): A relation's W is the sum over subjects, not the mean.
    W[:, best].mean(0), ⇒ W[:, best].sum(0),
own_state_in_b (relations): b holds what h itself brings, which W h counts again.
    others[:, pos] = 0 ⇒ others[:, pos] *= 1
radius_interpolated_from_zero (validity): A radius is interpolated as if the last error were 0.
    / (error - low) ⇒ / error
held_gate_lacks_z (validity): The held gate is a ratio where it should be act(g).
    ratio * seen[layer, "pre"] if gated else ratio ⇒ ratio
"""


@dataclass(frozen=True)
class Mutant:
    """A fault: one sentence, words of test files, and pairs of the library's text and the fault."""

    name: str
    wrong: str
    first: tuple[str, ...]
    wordings: tuple[tuple[str, str], ...]


def read_faults(text: str) -> list[Mutant]:
    """The faults of a text in the form of :data:`FAULTS`."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    found: list[Mutant] = []
    for block in re.split(r"\n(?=\w)", "\n".join(lines)):
        head, _, body = block.partition("\n")
        match = re.fullmatch(r"(\w+) \(([\w ]+)\): (.+)", head)
        pairs = re.findall(r"^    (.+) ⇒\s+(.+)$", body, re.MULTILINE)
        if match is None or not pairs or body.count("⇒") != len(pairs):
            raise SystemExit(f"expected a name, words, a sentence and texts with ⇒, got:\n{block}")
        found.append(Mutant(match[1], match[3], tuple(match[2].split()), tuple(pairs)))
    if len({mutant.name for mutant in found}) < len(found):
        raise SystemExit("expected every fault to have a name of its own")
    return found


def searched(text: str) -> re.Pattern[str]:
    """A pattern that finds a text whatever its spaces, line breaks and trailing commas."""
    words, pattern = re.findall(r"\w+|[^\w\s]", text), ""
    for before, word in zip(["", *words], words, strict=False):
        both = bool(re.match(r"\w", before)) and bool(re.match(r"\w", word))
        space = r"\s+" if both else r"\s*,?\s*" if word in ")]}" else r"\s*"
        pattern += (space if before else "") + re.escape(word)
    start, end = (r"\b" if re.match(r"\w", words[i]) else "" for i in (0, -1))
    return re.compile(start + pattern + end)


def put_in(mutant: Mutant, sources: dict[Path, str]) -> tuple[Path, int, str] | None:
    """A fault's file and line, and that file with the fault in it; None if it has no place."""
    counts = []
    for old, new in mutant.wordings:
        places = [(p, m) for p, text in sources.items() for m in searched(old).finditer(text)]
        counts.append(str(len(places)))
        if len(places) == 1:
            (path, at), text = places[0], sources[places[0][0]]
            whole = text[: at.start()] + new + text[at.end() :]
            compile(whole, str(path), "exec")
            return path, text.count("\n", 0, at.start()) + 1, whole
    print(f"{mutant.name}: there {' and '.join(counts)} times: {mutant.wordings[0][0]}")
    return None


class Runner:
    """Runs tests of a checkout with faults in it, and knows which tests fail without one."""

    def __init__(self, root: Path, options: argparse.Namespace, work: Path):
        self.root, self.options, self.work = root, options, work
        self.always = {
            TOO_LONG: False,
            NO_IMPORT: False,
        }  # tests that failed, and whether they do without a fault
        self.sound: Path | None = None
        self.notes = work / "note_failed_tests.py"
        self.notes.write_text(NOTES, encoding="utf-8")
        self.output = work / "output.txt"

    def copy(self, name: str) -> Path:
        """A copy of the checkout, with the data folder beside it where there is one."""
        target = self.work / name / self.root.name
        shutil.copytree(self.root, target, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        if (data := self.root.parent / "shared").exists():
            (target.parent / "shared").symlink_to(data.resolve(), target_is_directory=True)
        return target

    def caught(self, mutant: Mutant, path: Path, text: str) -> list[str]:
        """The tests that caught a fault first; none where it survived."""
        # 2. A checkout with the fault, and the tests.
        checkout = self.copy(mutant.name)
        (checkout / path).write_text(text, encoding="utf-8")
        try:
            for tests in self.selections(mutant, checkout):
                while failed := self.run(checkout, tests):
                    # 3. Tests that fail without the fault prove nothing.
                    if caught := [test for test in failed if not self.fails_always(test)]:
                        return caught
            return []
        finally:
            shutil.rmtree(checkout.parent)

    def selections(self, mutant: Mutant, checkout: Path) -> Iterator[list[str]]:
        """Which tests to run, one list after the other."""
        files = sorted(str(p.relative_to(checkout)) for p in checkout.glob("tests/**/test_*.py"))
        likely = [file for word in mutant.first for file in files if word in Path(file).stem]
        if likely and not self.options.tests:
            yield list(dict.fromkeys(likely))
        yield self.options.tests or ["tests"]

    def run(self, checkout: Path, tests: list[str]) -> list[str]:
        """Run tests until one fails; the names of those that failed."""
        if not (tests := [test for test in tests if not self.always.get(test)]):
            return []
        failed = Path(f"{self.notes}.txt")
        failed.write_text("", encoding="utf-8")
        words = ["-q", "-x", "-p", self.notes.stem, f"-n{self.options.workers}", *tests]
        words += ["-m", "core"] if self.options.core else []
        for test in (t for t, always in self.always.items() if always):
            words.append(f"--deselect={test}" if "::" in test else f"--ignore={test}")
        code = self.pytest(words, checkout)
        names = list(dict.fromkeys(failed.read_text(encoding="utf-8").splitlines()))
        new = [name for name in names if not self.always.get(name)]
        if code is None or new or code in (0, 5):  # 5: no test was selected
            return [TOO_LONG] if code is None else new
        output = self.output.read_text(encoding="utf-8")[-3000:]
        raise SystemExit(f"pytest ended with {code} and no new failure:\n{output}")

    def fails_always(self, test: str) -> bool:
        """Whether a test fails without a fault, too."""
        if test not in self.always:
            self.sound = self.sound or self.copy("sound")
            self.always[test] = bool(self.run(self.sound, [test]))
            if self.always[test]:
                print(f"!  {test} fails without a fault, too: left out", flush=True)
        return self.always[test]

    def pytest(self, words: list[str], checkout: Path) -> int | None:
        """Pytest's exit code in a copy of this process; None where it ran past ``--limit``.

        The copy has imported torch and the host already, and imports the package from a checkout.
        """
        child = os.fork()
        if child == 0:
            os.setsid()
            with open(self.output, "w", encoding="utf-8") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            code = 70
            try:
                os.chdir(checkout)
                sys.path[:0] = [str(checkout), str(self.work)]
                paths = [str(checkout), str(self.work), *filter(None, [os.getenv("PYTHONPATH")])]
                os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for what the tests start
                if checkout not in Path(str(import_module(PACKAGE).__file__)).parents:
                    print(f"{PACKAGE} was not imported from {checkout}")
                else:
                    code = int(pytest.main(words))
            except BaseException:  # the fault may be met on import
                traceback.print_exc()
                (self.work / f"{self.notes.name}.txt").write_text(
                    f"{NO_IMPORT}\n", encoding="utf-8"
                )
            finally:
                sys.stdout.flush()
                os._exit(code)
        end = time.monotonic() + (self.options.limit or float("inf"))
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.1)
        return os.waitstatus_to_exitcode(done[1])


def main() -> int:
    """Run the command line; 1 if a fault survived, or more than a tenth with ``--core``, else 0."""
    parser = argparse.ArgumentParser(description="Do the tests notice faults in the library?")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--core", action="store_true", help="run the tests marked core alone")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="run these tests alone")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout than this")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest (default: one)")
    parser.add_argument("--limit", type=float, help="seconds that one run of pytest may take")
    parser.add_argument("--list", action="store_true", help="print the faults, run nothing")
    options = parser.parse_args()
    root = (options.before or Path(__file__).parents[1]).resolve()
    files = sorted((root / PACKAGE).rglob("*.py"))
    sources = {path.relative_to(root): path.read_text(encoding="utf-8") for path in files}
    # 1. Every fault's place.
    mutants = read_faults(FAULTS)
    if unknown := set(options.only or ()) - {mutant.name for mutant in mutants}:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}: see --list")
    chosen = [m for m in mutants if options.only is None or m.name in options.only]
    placed = [(mutant, found) for mutant in chosen if (found := put_in(mutant, sources))]
    if len(placed) < len(chosen):
        raise SystemExit("give each of these faults a text that is there exactly once")
    if options.list:
        for mutant, (path, line, _) in placed:
            print(f"{mutant.name:<31} {mutant.wrong}  [{path}:{line}]")
        return 0
    for name in ("torch", "transformers", "transformer_lens"):
        import_module(name)  # once: every run of pytest is a copy of this process
    n_caught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        runner = Runner(root, options, Path(work).resolve())
        for mutant, (path, _, text) in placed:
            start = time.monotonic()
            tests = runner.caught(mutant, path, text)
            seconds, word = time.monotonic() - start, "caught" if tests else "SURVIVED"
            # 4. The fault's line.
            by = ", ".join(tests[:2])
            print(f"{mutant.name:<31} {word:<8} {seconds:5.0f} s  {by}", flush=True)
            n_caught += bool(tests)
    print(f"{n_caught} of {len(placed)} faults caught")
    return 0 if n_caught >= (CORE_SHARE if options.core else 1) * len(placed) else 1


if __name__ == "__main__":
    sys.exit(main())
