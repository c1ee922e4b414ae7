"""Random shapes and configurations: the operator reproduces the logits of every one."""

import pytest
import torch
from comparisons import assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import ROUNDING, HookedTransformer, build_bridge, build_hooked, quiet

import tensorlens_tl
from tensorlens_tl import dot_test

SEEN: set = set()
N_EXAMPLES = 60


@st.composite
def hooked_configs(draw):
    n_heads = draw(st.integers(1, 4))
    d_head = draw(st.sampled_from([2, 4, 6]))
    norm = draw(st.sampled_from(["LN", "LNPre", "RMS", "RMSPre", None]))
    config = {
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": n_heads,
        "d_head": d_head,
        "d_model": draw(st.integers(2, 12)),
        "d_vocab": draw(st.integers(2, 20)),
        "normalization_type": norm,
        "seed": draw(st.integers(0, 3)),
        "n_key_value_heads": draw(
            st.sampled_from([None, *(k for k in (1, 2, 4) if n_heads % k == 0)])
        ),
    }
    if draw(st.booleans()):
        config |= {"positional_embedding_type": "rotary", "rotary_dim": d_head}
    if draw(st.booleans()) and norm == "RMS":  # the host builds no other double norm
        config["use_normalization_before_and_after"] = True
    config["parallel_attn_mlp"] = draw(st.booleans()) and not config.get(
        "use_normalization_before_and_after"
    )
    double = config.get("use_normalization_before_and_after")
    if draw(st.integers(0, 5)) == 0 and not double:  # the host cannot build both
        config |= {"attn_only": True, "d_mlp": None, "act_fn": None, "parallel_attn_mlp": False}
    else:
        config["d_mlp"] = draw(st.integers(1, 12))
        config["gated_mlp"] = draw(st.booleans())
        acts = ["relu", "gelu", "gelu_new", "gelu_fast", "silu"]
        config["act_fn"] = draw(st.sampled_from(acts))
    if draw(st.booleans()):
        config["output_logits_soft_cap"] = draw(st.sampled_from([-1.0, 2.0, 30.0]))
    return config


def check(model, batch, pos, gate, seed, tol):
    ids = torch.randint(
        0, model.cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed)
    )
    with quiet(), torch.no_grad():
        logits, lens = tensorlens_tl.capture(model, ids, gate=gate)
    op = lens.operator
    y = op @ lens.embedding + op.bias
    assert dot_test(op, seed) <= ROUNDING
    if tol <= ROUNDING:
        assert_close(lens.readout(y), logits, tol)
        size = 0.0
    else:  # a norm in float32 rounds at the size of a logit's terms, which may cancel
        size = (y.abs() @ lens.capture.unembed.weights.W_U.abs()).max()
        assert (lens.readout(y) - logits).abs().max() <= tol * size
    for by in ("token", "component"):
        found = lens.attribute(0, pos=seed % pos, by=by)
        off = (found.values.sum(-1) - found.target_value).abs()
        assert (off <= 10 * tol * found.values.abs().sum(-1).clamp_min(size)).all()


if HookedTransformer is not None:
    any_shape = given(
        hooked_configs(),
        st.integers(1, 3),
        st.integers(1, 6),
        st.sampled_from(["gate", "up", "half"]),
        st.integers(0, 5),
    )
    options = {
        "deadline": None,
        "derandomize": True,
        "suppress_health_check": list(HealthCheck),
    }

    @settings(max_examples=N_EXAMPLES, **options)
    @any_shape
    def test_hooked_transformers_of_any_shape(config, batch, pos, gate, seed):
        with quiet():
            model = build_hooked(config, torch.float64)
        SEEN.add((repr(sorted(config.items(), key=str)), batch, pos, gate))
        check(model, batch, pos, gate, seed, 1e-12)

    @pytest.mark.fuzz
    @settings(max_examples=480, **options)
    @any_shape
    def test_many_more_shapes(config, batch, pos, gate, seed):
        # A norm of two numbers divides their difference by itself: its rounding has no bound.
        assume(config["d_model"] > 2)
        with quiet():
            model = build_hooked(config, torch.float64)
        check(model, batch, pos, gate, seed, 1e-12)

    def test_enough_distinct_configurations():
        if not SEEN:
            test_hooked_transformers_of_any_shape()
        assert len(SEEN) >= 0.75 * N_EXAMPLES

else:

    @st.composite
    def bridge_configs(draw):
        heads = draw(st.sampled_from([1, 2, 4]))
        head = draw(st.sampled_from([2, 4, 8]))
        name = draw(st.sampled_from(["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX"]))
        layers, vocab = draw(st.integers(1, 3)), draw(st.integers(4, 20))
        width = heads * head
        if name == "GPT2":
            inner = draw(st.integers(1, 12))
            shape = {
                "n_embd": width,
                "n_layer": layers,
                "n_head": heads,
                "n_inner": inner,
                "n_positions": 16,
                "n_ctx": 16,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
        else:
            shape = {
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "intermediate_size": draw(st.integers(1, 12)),
                "max_position_embeddings": 16,
                "pad_token_id": 0,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
            if name == "GPTNeoX":
                shape["use_parallel_residual"] = draw(st.booleans())
                shape["rotary_pct"] = 1.0
            else:
                shape["num_key_value_heads"] = draw(
                    st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])
                )
                shape |= {"head_dim": head} if name == "Qwen3" else {}
        return name, {**shape, "vocab_size": vocab}

    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        bridge_configs(),
        st.integers(1, 3),
        st.integers(1, 6),
        st.sampled_from(["gate", "up", "half"]),
        st.integers(0, 5),
    )
    def test_bridges_of_any_shape(named, batch, pos, gate, seed):
        name, config = named
        with quiet():
            model = build_bridge(name, config, torch.float64)
        SEEN.add((name, repr(sorted(config.items(), key=str)), batch, pos, gate))
        check(model, batch, pos, gate, seed, 1e-12 if name == "GPT2" else 1e-6)

    def test_enough_distinct_configurations():
        if not SEEN:
            test_bridges_of_any_shape()
        assert len(SEEN) >= 0.75 * N_EXAMPLES


def test_the_sweep_finds_a_wrong_operator():
    """The comparison can fail: halving the bias is noticed."""
    from models import SHAPES, lens_of

    lens = lens_of(SHAPES[0])
    wrong = lens.readout(lens.operator @ lens.embedding + lens.operator.bias / 2)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wrong, lens.logits, ROUNDING)
