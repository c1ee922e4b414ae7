"""Rows of the frozen replacement model, against one that is written out with the host's hooks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from comparisons import assert_close
from models import ENCODERS, PER_SHAPE, lens_of, tokens
from oracles import FrozenModel
from transcoders import KINDS, READS, transcoders

from tensorlens_tl.attribution import resolve
from tensorlens_tl.replacement import ReplacementModel

pytestmark = pytest.mark.algebra

WITH_MLP = [case for case in PER_SHAPE if "attn-only" not in case.name]
EVERY = slice(None)


def model_of(case, *args, **options):
    lens = lens_of(case)[0]
    given = transcoders(lens, *args, **options)
    return ReplacementModel.of(given, lens.capture, lens.operator)


def check_rows(model, tol):
    """Everything that sums does."""
    targets = [resolve(model.capture, 3), resolve(model.capture, 5, pos=2)]
    value = torch.cat([target.value for target in targets])
    for through in (False, True):
        found = model.of_targets(targets, through)
        assert_close(found.total(not through), value, tol)
    for number, mlp in enumerate(model.mlps):
        if len(mlp.at):
            rows = model.of_features(number, EVERY)
            assert_close(rows.total(), model.explained(number, EVERY), tol)


SUMS = [(case, reads) for case in WITH_MLP for reads in READS[:2]]
SUMS += [(case, READS[1]) for case in ENCODERS[:1]]
SUMS += [(case, READS[2]) for case in WITH_MLP if case.name.endswith(("-llama", "-gemma2"))]


@pytest.mark.parametrize(("case", "reads"), SUMS, ids=str)
def test_rows_sum_to_what_they_explain(case, reads):
    model = model_of(case, "skip", reads)
    assert all(len(mlp.at) > 20 for mlp in model.mlps)
    check_rows(model, case.within("run"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_transcoder_sums(kind):
    case = WITH_MLP[0]
    model = model_of(case, kind)
    check_rows(model, case.within("run"))
    check_rows(model_of(case, kind, layers=[1]), case.within("run"))
    given = [mlp.dictionary.reconstruct(mlp.x.double()) for mlp in model.mlps]
    given = [y.unsqueeze(1) if y.ndim == 2 else y for y in given]
    for n, mlp in enumerate(model.mlps):
        # What fires is what the dictionary says, and the error is what its sums leave out.
        z = torch.zeros(len(mlp.x), mlp.dictionary.d_sae, dtype=torch.float64)
        z[mlp.at, mlp.features] = mlp.acts
        assert_close(z, mlp.dictionary.encode(mlp.x), 1e-12)
        sums = (y[:, n - i] for i, y in enumerate(given[: n + 1]) if y.shape[1] > n - i)
        assert_close(model.errors[n], mlp.y - sum(sums), 1e-12)


class WrittenOut(FrozenModel):
    """The host frozen by hooks, where every MLP's output is y = Σ z d + b_dec + x W_skip + ε.

    Features z and errors ε are those of the run, what is in ``drop`` is left out of y, and x is
    live. With ``through``, z is live, too, at held slopes z / a.
    """

    def __init__(self, case, model):
        super().__init__(case.model(), tokens()[:1])
        self.replaced, self.drop, self.live, self.through = model, {}, {}, False
        self.handles = []

    def _hooks(self):
        hooks = super()._hooks()
        for number, mlp in enumerate(self.replaced.mlps):
            if (site := mlp.dictionary.site).endswith("hook_in"):
                module = self.model.blocks[mlp.layer].mlp
                keep = partial(self._keep_input, number)
                self.handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
            else:
                hooks.append((site, lambda t, hook, i=number: self.live.__setitem__(i, t[0])))
            writes = mlp.dictionary.writes
            hooks.append((writes, lambda t, hook, i=number: self.written(i)[None]))
        return hooks

    def _keep_input(self, number, module, args, kwargs):
        (self.live[number],) = (args or tuple(kwargs.values()))[0]

    def activation(self, number):
        """Of every feature at every position, with slopes held."""
        mlp, x = self.replaced.mlps[number], self.live[number]
        a, _ = mlp.dictionary.pre_activations(x if self.through else mlp.x)
        was, _ = mlp.dictionary.pre_activations(mlp.x)
        return mlp.dictionary.encode(mlp.x) / was * a

    def written(self, number):
        mlp = self.replaced.mlps[number]
        y = mlp.y.clone()
        for i in range(number + 1):
            W, ahead = self.replaced.mlps[i].dictionary.W_dec, number - i
            d = W if W.ndim == 2 and not ahead else None
            d = W[:, ahead] if W.ndim == 3 else d
            if d is None:
                continue
            z = self.activation(i)
            for place in self.drop.get(i, ()):
                z[place] = 0
            y += (z - self.replaced.mlps[i].dictionary.encode(self.replaced.mlps[i].x)) @ d
        y -= self.drop.get(("error", number), 0)
        if (skip := mlp.dictionary.W_skip) is not None:
            y += (self.live[number] - mlp.x) @ skip
        return y

    def run(self, x, drop, through=False):
        """The final normalized residual, and all pre-activations by MLP."""
        self.drop, self.through = drop, through
        try:
            with torch.no_grad():
                y, _ = self(x)
        finally:
            while self.handles:
                self.handles.pop().remove()
        pre = [
            mlp.dictionary.pre_activations(self.live[i])[0]
            for i, mlp in enumerate(self.replaced.mlps)
        ]
        return y, pre


@pytest.mark.parametrize(
    ("case", "kind", "reads"),
    [(case, "skip", READS[0]) for case in WITH_MLP]
    + [(WITH_MLP[0], "cross-layer skip", READS[1]), (WITH_MLP[0], "jumprelu", READS[1])],
    ids=str,
)
def test_an_edge_is_what_removing_the_writer_changes(case, kind, reads):
    model = model_of(case, kind, reads)
    written = WrittenOut(case, model)
    x, tol = model.capture.input, case.within("oracle")
    u = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    target = resolve(model.capture, u)
    plain, pre = written.run(x, {})
    last = len(model.mlps) - 1
    rows = model.of_features(last, EVERY)
    every = model.of_targets([target]), model.of_targets([target], through=True)
    mlp = model.mlps[last]

    moved, rows_of = [], []

    def check(drop, *rows):
        for through in (False, True):
            y, a = written.run(x, drop, through)
            moved.append((plain - y)[0, -1] @ u)
            rows_of.append(rows[through])
            if not through:
                assert_close((pre[last] - a[last])[mlp.at, mlp.features], rows[2], tol)

    # 1. Some features, one of the last position among them.
    first = model.mlps[0]
    for i in (2, len(first.at) // 2, len(first.at) - 1):
        drop = {0: [(int(first.at[i]), int(first.features[i]))]}
        check(drop, *(found.features[0][:, i] for found in (*every, rows)))
    # 2. Some errors.
    for pos in (1, 4, 6):
        error = torch.zeros_like(first.y)
        error[pos] = model.errors[0][pos]
        check({("error", 0): error}, *(found.errors[:, 0, pos] for found in (*every, rows)))
    assert_close(torch.stack(moved), torch.cat(rows_of), tol)


def test_what_does_not_fit_is_refused():
    case = WITH_MLP[0]
    lens = lens_of(case)
    one = lens[0]

    def refused(match, given, lens=one):
        with pytest.raises(ValueError, match=match):
            ReplacementModel.of(given, lens.capture, lens.operator)

    given = transcoders(one)
    refused("needs one prompt, but the lens has 2", given, lens)
    refused("There is no transcoder", [])
    refused("Two transcoders write to block 0", [given[0], *given])
    refused("comes after the MLP", [replace(given[0], site="blocks.0.hook_resid_post")])
    refused("no place that can be read", [replace(given[0], site="blocks.0.hook_attn_out")])
    refused("is no transcoder of an MLP", [replace(given[0], writes="blocks.0.hook_attn_out")])
    refused("is no transcoder of an MLP", [replace(given[0], writes=given[0].site)])
    refused("its last block is 1", [replace(given[0], writes="blocks.7.hook_mlp_out")])
    wide = given[0].W_dec[:, None].expand(-1, 3, -1)
    refused("block 2, which this model lacks", [replace(given[0], W_dec=wide)])
    refused("writes another width, 31", [replace(given[0], W_dec=given[0].W_dec[:, 1:])])
    refused("reads another width, 31", [replace(given[0], W_enc=given[0].W_enc[1:])])
    refused("trained on 'gpt9'", [replace(given[0], model_name="gpt9")])
    for other in WITH_MLP:
        if other.name.endswith("gemma2"):  # what an MLP writes is not what reaches the residual
            given = transcoders(lens_of(other)[0], writes="mlp.hook_out")
            refused("A norm follows", given, lens_of(other)[0])
    same = model_of(case, writes="mlp.hook_out").errors, model_of(case).errors
    assert_close(*map(torch.stack, same), 0)
