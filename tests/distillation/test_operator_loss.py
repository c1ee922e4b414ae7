"""The loss between two operators: by a plain loop, its gradient, its cost, and what it refuses."""

import gc

import pytest
import torch
from models import GRADIENT, ORACLE, HookedTransformer, quiet, to_bridge
from torch.utils.flop_counter import FlopCounterMode

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.distillation import OperatorLoss, rows_of

pytestmark = pytest.mark.algebra

IDS = torch.tensor([[3, 9, 4, 7, 12, 5], [8, 3, 3, 10, 6, 11]])


@pytest.fixture(scope="module")
def teacher():
    with quiet():
        return demo.load_model().requires_grad_(False).to(torch.float64)


def student(d_vocab, layers=1, width=16, dtype=torch.float64):
    """A model of another shape with the teacher's words, of the host class that is installed."""
    torch.manual_seed(0)
    shape = {"d_model": width, "n_heads": 2, "d_head": width // 2, "d_mlp": 4 * width, "n_ctx": 64}
    if HookedTransformer is not None:
        from transformer_lens import HookedTransformerConfig

        with quiet():
            return HookedTransformer(
                HookedTransformerConfig(
                    **shape,
                    n_layers=layers,
                    d_vocab=d_vocab,
                    act_fn="gelu_new",
                    normalization_type="LN",
                    dtype=dtype,
                    device="cpu",
                    seed=0,
                    init_mode="gpt2",
                )
            )
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_head=2,
        n_embd=width,
        n_inner=4 * width,
        n_positions=64,
        vocab_size=d_vocab,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    with quiet():
        return to_bridge(GPT2LMHeadModel(config).to(dtype))


def lenses(model, teacher, ids=IDS):
    with quiet():
        held = tensorlens_tl.capture(teacher, ids)[1]
        return tensorlens_tl.capture(model, ids, graph=True)[1], held


def test_rows_by_the_operators_blocks(teacher):
    """Every entry is u_iᵀ T_ij x_j with the block T_ij, and the teacher's token matrix agrees."""
    lens = lenses(student(teacher.cfg.d_vocab), teacher)[1]
    query, tokens = torch.tensor([[5, 3], [2, 4]]), torch.tensor([[7, 8], [9, 10]])
    found, W_U = rows_of(lens, query, tokens), lens.capture.unembed.weights.W_U
    for row, prompt, j in ((0, 0, 2), (0, 1, 3), (1, 0, 2), (1, 1, 0)):
        u = W_U[:, tokens[row, prompt]] - W_U.mean(1)
        T = lens[prompt].operator.block(int(query[row, prompt]), j)[0]
        expected = u @ T @ lens.embedding[prompt, j]
        assert (found[row, prompt, j] - expected).abs() <= ORACLE * found.abs().max()
    centred = W_U[:, 7] - W_U.mean(1)
    whole = lens[0].token_matrix("in_out", centred).values[0, 5]
    assert (found[0, 0] - whole).abs().max() <= ORACLE * whole.abs().max()


def test_loss_by_a_plain_loop(teacher):
    """Maps, counterfactual rows and norms, each entry by a block of either operator."""
    model = student(teacher.cfg.d_vocab)
    lens, held = lenses(model, teacher)
    loss = OperatorLoss(0.5, 2.0, 3.0, rows=2, words=2, probes=32, size=0.1, seed=4)
    generator = torch.Generator().manual_seed(4 * 1_000_003 + 7)
    query = torch.multinomial(torch.ones(2, 6), 2, True, generator=generator).T
    words = torch.randint(teacher.cfg.d_vocab, (2, 2, 6), generator=generator)

    def parts(lens):
        maps, norms = torch.zeros(2, 2, 2, 6).double()
        B = torch.zeros(2, 2, 2, 6).double()
        W_U, W_E = lens.capture.unembed.weights.W_U, lens.capture.embed_weights.W_E
        for prompt, one in enumerate(lens):
            T = one.operator.to_dense()[0]  # [query_pos, out, key_pos, in]
            for row in (0, 1):
                i = int(query[row, prompt])
                said = held.logits[prompt, i].argmax()
                u = W_U[:, said] - W_U.mean(1)
                for j in range(6):
                    cov, x = u @ T[i, :, j], one.embedding[0, j]
                    maps[row, prompt, j] = cov @ x
                    norms[row, prompt, j] = T[i, :, j].norm()
                    place = x - one.capture.embed[0, j]
                    for w in (0, 1):
                        B[row, prompt, w, j] = cov @ (W_E[words[w, prompt, j]] + place)
        return maps, B.flatten(2), norms

    with torch.no_grad():
        ours, theirs = parts(tensorlens_tl.capture(model, IDS)[1]), parts(held)
    maps, B, norms = (loss.distance(a, b) for a, b in zip(ours, theirs, strict=True))
    alone = OperatorLoss(0.5, 2.0, rows=2, words=2, size=0.1, seed=4)
    expected = 0.5 * maps + 2 * B
    assert (alone(lens, held, step=7) - expected).abs() <= ORACLE * expected
    found = (loss(lens, held, step=7) - alone(lens, held, step=7)) / 3
    # The relative error of a norm is √(1 / (2 probes)), and ‖a − b‖² has the slope 2 ‖a − b‖.
    error = (2 / (2 * 32)) ** 0.5
    assert (found - norms).abs() <= 4 * (norms.sqrt() * error + error**2)


def test_gradient_is_the_slope(teacher):
    model = student(teacher.cfg.d_vocab)
    loss = OperatorLoss(1.0, 0.5, 0.5, rows=2, size=0.1)
    weights = [p for n, p in model.named_parameters() if "qkv" not in n and "b_U" not in n]
    grads = torch.autograd.grad(loss(*lenses(model, teacher)), weights, allow_unused=True)
    generator, h, moved = torch.Generator().manual_seed(0), 1e-4, {}
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std() for p in weights]
    steps = [torch.where(s.isfinite(), s, 0) for s in steps]
    slope = sum((g * s).sum() for g, s in zip(grads, steps, strict=True) if g is not None)
    for by in (-2, -1, 1, 2):
        with torch.no_grad():
            for p, s in zip(weights, steps, strict=True):
                p.add_(s, alpha=by * h)
        moved[by] = loss(*lenses(model, teacher)).detach()
        with torch.no_grad():
            for p, s in zip(weights, steps, strict=True):
                p.sub_(s, alpha=by * h)
    expected = (8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * h)
    assert (slope - expected).abs() <= 10 * GRADIENT * (1 + expected.abs())


def test_the_teacher_is_its_own_best_student(teacher):
    lens, held = lenses(teacher.requires_grad_(True), teacher)
    teacher.requires_grad_(False)
    assert OperatorLoss(1.0, 1.0, 1.0, rows=3, size=1.0)(lens, held) < 1e-12


def test_rows_are_drawn_by_weight(teacher):
    """Only positions that weigh are compared; what stands elsewhere changes nothing."""
    lens, held = lenses(student(teacher.cfg.d_vocab), teacher)
    weights = torch.zeros(2, 6)
    weights[0, 4], weights[1, 2] = 1.0, 3.0
    loss = OperatorLoss(rows=3)
    rows = [
        rows_of(m, torch.tensor([[4, 2]]), held.logits[[0, 1], [4, 2]].argmax(-1)[None])
        for m in (lens, held)
    ]
    expected = loss.distance(*rows)
    assert (loss(lens, held, weights, step=3) - expected).abs() <= ORACLE * expected


def test_the_ramp():
    loss = OperatorLoss(ramp=(10, 20))
    assert [loss.weight(step) for step in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert OperatorLoss().weight(0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0 is below 1"),
        ({"maps": -1.0}, r"maps=-1\.0 is no factor"),
        ({"ramp": (9, 3)}, r"ramp=\(9, 3\) is no pair"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        OperatorLoss(**options)


def test_lenses_that_do_not_fit(teacher):
    lens, held = lenses(student(teacher.cfg.d_vocab), teacher)
    loss = OperatorLoss()
    with pytest.raises(ValueError, match="without a graph"):
        loss(held, held)
    with pytest.raises(ValueError, match="other tokens"):
        loss(lens, held[0])
    with pytest.raises(ValueError, match="is 0 all over a prompt"):
        loss(lens, held, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="has shape"):
        loss(lens, held, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="Pass the lens"):
        loss(lens, 3)
    other = lenses(student(teacher.cfg.d_vocab + 1), teacher)[0]
    with pytest.raises(ValueError, match="one vocabulary"):
        loss(other, held)


def steps(model, teacher, ids, operator):
    """A training step of a plain loop: logits alone, or with the operator's maps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number):
        with torch.no_grad():
            if operator:
                said, held = tensorlens_tl.capture(teacher, ids)
            else:
                said = teacher(ids)
        if operator:
            logits, lens = tensorlens_tl.capture(model, ids, graph=True)
            loss = operator(lens, held, step=number)
        else:
            logits, loss = model(ids), 0.0
        loss = loss + torch.nn.functional.kl_div(
            logits.log_softmax(-1), said.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def test_a_loop_trains_and_does_not_grow():
    """The loss falls over a few steps, and no tensor of an earlier step is kept."""
    with quiet():
        teacher = demo.load_model().requires_grad_(False)
    model = student(teacher.cfg.d_vocab, dtype=torch.float32)
    step = steps(model, teacher, IDS, OperatorLoss(rows=2))

    def alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    with quiet():
        first, counts = step(0), []
        for number in range(1, 7):
            last = step(number)
            counts += [alive()] if number % 3 == 0 else []
    assert last < first
    assert counts[-1] == counts[0]


def test_a_step_costs_at_most_twice_the_logits_alone():
    """In products: a step with one row per prompt against one of plain distillation."""
    with quiet():
        teacher = demo.load_model().requires_grad_(False)
    model = student(teacher.cfg.d_vocab, 2, 64, torch.float32)
    ids = torch.randint(3, 60, (8, 64), generator=torch.Generator().manual_seed(0))
    flops = []
    for operator in (None, OperatorLoss()):
        step = steps(model, teacher, ids, operator)
        with quiet(), FlopCounterMode(display=False) as counter:
            step(0)
        flops.append(counter.get_total_flops())
    assert flops[1] <= 2.0 * flops[0]
