"""HeadVis folders and the arguments of CircuitsVis: against slow loops, and in the real package."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from tensorlens_tl import demo
from tensorlens_tl.exports.circuitsvis import FUNCTIONS, SEVERAL
from tensorlens_tl.exports.headvis import METRICS

pytestmark = pytest.mark.algebra
PROMPTS = ["The capital of France is Paris and the capital of Italy is", "Paris is the capital of"]


@pytest.fixture(scope="session")
def lens():
    return demo.load_model().run_with_tensorlens(PROMPTS)[1]


@pytest.fixture(scope="session")
def folder(lens, tmp_path_factory):
    found = tmp_path_factory.mktemp("headvis") / "data"
    lens.save_headvis(found, top_k=3, n_intervals=2, dataset="capitals")
    return found


def read(file):
    return json.loads(file.read_text())


def pattern_of(lens, prompt, layer, head):
    start, stop = lens.capture.frame.spans[prompt]
    return lens.capture.blocks[layer].attn.pattern[prompt, head, start:stop, start:stop].double()


def test_every_head_has_its_file(lens, folder):
    config = read(folder / "config.json")
    assert config["heads"] == [[layer, head] for layer in range(4) for head in range(4)]
    assert config["n_intervals"] == 2 and config["pipeline_config"]["dataset_name"] == "capitals"
    names = {config["head_data_pattern"].format(layer=a, head=b) for a, b in config["heads"]}
    assert {file.name for file in (folder / "heads").iterdir()} == names
    rows = read(folder / "scatter_data.json")
    assert all({"layer", "head", *config["metrics"]} == row.keys() for row in rows)
    assert config["metrics"] == list(METRICS) and len(rows) == 16
    assert [file.name for file in folder.parent.iterdir()] == ["data"]


def test_the_folder_has_what_the_loaders_ask_for(folder):
    """HeadVis is in no package: its pipeline and Neuronpedia's loaders say what they need."""
    config = read(folder / "config.json")
    about = {"model_name", "dataset_name", "n_sequences", "seq_len", "dtype", "attn_implementation"}
    assert about <= {k for k, value in config["pipeline_config"].items() if value is not None}
    assert {"n_layers", "n_heads", "metric_descriptions", "has_umap"} <= config.keys()
    assert read(folder / "server_config.json") == read(folder / "attributions/manifest.json") == {}
    for row in read(folder / "scatter_data.json"):
        assert all(row[name] is None or math.isfinite(row[name]) for name in config["metrics"])
    for layer, head in config["heads"]:
        data = read(folder / "heads" / f"L{layer}H{head}.json")
        for plot in config["custom_plots"]:
            edges, values = (data[plot["key"]][name] for name in ("bin_edges", "bin_values"))
            assert len(edges) == len(values) + 1 and edges == sorted(edges)
        for table in config["custom_tables"]:
            assert all(row.keys() == {"token", "weight"} for row in data[table["key"]])
        assert config["statistics_display"].keys() <= data["statistics"].keys()
        for found in data["sequences"]:
            at, values, n = (
                found[name] for name in ("attention_indices", "attention_values", "seq_len")
            )
            assert len(at) == len(values) == len(set(at)) and n == len(found["tokens"])
            assert all(isinstance(i, int) and 0 <= i % n <= i // n < n for i in at)  # causal
            assert all(0.005 <= x <= 1 and round(x, 4) == x for x in values)
            assert 1 <= found["interval"] <= config["n_intervals"]


def test_scores_by_slow_loops(lens, folder):
    for row in read(folder / "scatter_data.json"):
        own, before, entropy, induction, weights, distances = [], [], [], [], [], []
        for i, tokens in enumerate(lens.tokens):
            A = pattern_of(lens, i, row["layer"], row["head"]).tolist()
            for q, line in enumerate(A):
                own.append(line[q])
                before += [line[q - 1]] if q else []
                entropy.append(-sum(a * math.log(a) for a in line if a))
                earlier = [j for j in range(q) if tokens[j] == tokens[q]]
                induction += [sum(line[j + 1] for j in earlier)] if earlier else []
                weights += line
                distances += [abs(q - k) for k in range(len(line))]
        mean = np.average(distances, weights=weights)
        expected = {
            "self_attention_score": np.mean(own),
            "prev_token_score": np.mean(before),
            "pattern_entropy": np.mean(entropy),
            "qk_distance": mean,
            "qk_distance_variance": np.average((np.array(distances) - mean) ** 2, weights=weights),
            "induction_score": np.mean(induction),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=2e-6), name


def test_patterns_are_sparse_and_each_rows_largest(lens, folder):
    data = read(folder / "heads" / "L1H2.json")
    for i, found in enumerate(data["sequences"]):
        A, n = pattern_of(lens, i, 1, 2), len(lens.tokens[i])
        assert found["tokens"] == list(lens.tokens[i]) and found["seq_len"] == n
        assert found["max_activation"] == pytest.approx(float(A[1:, 1:].max()), abs=5e-5)
        kept = torch.zeros(n * n, dtype=torch.float64)
        kept[found["attention_indices"]] = torch.tensor(found["attention_values"]).double()
        kept = kept.view(n, n)
        for q in range(n):
            expected = sorted((a for a in A[q].tolist() if a >= 0.005), reverse=True)[:3]
            row = sorted(filter(None, kept[q].tolist()), reverse=True)
            assert row == pytest.approx(expected, abs=5e-5)
        assert ((kept == 0) | ((kept - A).abs() < 5e-5)).all()
    assert sorted(x["interval"] for x in data["sequences"]) == [1, 2]
    whole = sum(sum(x["attention_values"]) for x in data["sequences"])
    histogram = data["qk_distance_histogram"]
    assert len(histogram["bin_edges"]) == len(histogram["bin_values"]) + 1
    assert sum(histogram["bin_values"]) == pytest.approx(whole, abs=1e-3)
    for side in ("top_query_tokens", "top_key_tokens"):
        assert sum(x["weight"] for x in data[side]) == pytest.approx(whole, abs=5e-3)
    assert sum(data["histogram"]["bin_values"]) == data["statistics"]["n_samples"] == 2


def test_headvis_refusals_leave_nothing(lens, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot be made"):
        lens.save_headvis(folder)
    with pytest.raises(ValueError, match="least=2 is not a share"):
        lens.save_headvis(tmp_path / "new", least=2)

    def full(*_):
        raise OSError("The disk is full.")

    monkeypatch.setattr("tensorlens_tl.exports.headvis._config", full)
    with pytest.raises(OSError, match="The disk is full"):
        lens.save_headvis(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- CircuitsVis ---------------------------------------------------------------------------------


def arguments(lens, name):
    about = {"layer": 1, "head": 2} if name == "attention_pattern" else {}
    return (lens if name in SEVERAL else lens[0]).circuitsvis(name, "Rome", **about)


def test_the_arrays_of_every_function(lens):
    one, n = lens[0], len(lens.tokens[0])
    heads = arguments(lens, "attention_heads")
    assert heads["attention"].shape == (16, n, n) and heads["attention_head_names"][6] == "L1H2"
    assert torch.equal(heads["attention"][6].double(), pattern_of(lens, 0, 1, 2))
    assert torch.equal(arguments(lens, "attention_pattern")["attention"], heads["attention"][6])
    assert heads["mask_upper_tri"] and heads["tokens"] == list(lens.tokens[0])
    # Tokens' shares, with their positions' own, and heads by position.
    rows = one.attribute("Rome").sum("node")
    shares = [
        float(v) for s, v in zip(rows.sources, rows.values[0], strict=True) if s.pos is not None
    ]
    assert arguments(lens, "colored_tokens")["values"].tolist() == pytest.approx(shares, abs=1e-5)
    total = one.attribute("Rome", by="head", effect="total").sum("pos")
    several = arguments(lens, "colored_tokens_multi")
    effects = dict(zip(map(str, (s.node for s in total.sources)), total.values[0], strict=True))
    for name, value in zip(several["labels"], several["values"].sum(0), strict=True):
        assert float(value) == pytest.approx(float(effects[name]), abs=1e-5)
    nested = arguments(lens, "topk_samples")["activations"]
    assert nested[1][2][0] == pytest.approx(several["values"][:, 6].tolist(), abs=1e-5)
    assert [len(x) for x in nested[0][0]] == [len(x) for x in lens.tokens]
    neurons = arguments(lens, "text_neuron_activations")["activations"]
    assert neurons.shape[:2] == (n, 4)
    assert np.array_equal(
        arguments(lens, "topk_tokens")["activations"][0][1], neurons[:, 1].numpy()
    )
    said = arguments(lens, "token_log_probs")
    assert said["log_probs"].shape[0] == len(said["token_indices"]) == n
    assert said["to_string"](int(said["token_indices"][4])) == lens.tokens[0][4]


def test_circuitsvis_refusals(lens):
    wrong = {
        "There is no function 'heads'": (lens[0], "heads", {}),
        "shows one prompt, but the lens has 2": (lens, "attention_heads", {}),
        "takes no layer= here": (lens[0], "colored_tokens", {"layer": 0}),
        "takes no head= here": (lens[0], "attention_heads", {"head": 0}),
        "layer=9 does not exist": (lens[0], "attention_heads", {"layer": 9}),
        "head=9 does not exist": (lens[0], "attention_pattern", {"layer": 0, "head": 9}),
        "shows one head": (lens[0], "attention_pattern", {"layer": 0}),
    }
    for message, (own, name, about) in wrong.items():
        with pytest.raises(ValueError, match=message):
            own.circuitsvis(name, **about)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_package_draws_them(lens, name):
    pytest.importorskip("circuitsvis", reason="circuitsvis is not installed")
    homes = ("attention", "tokens", "logits", "activations", "topk_tokens", "topk_samples")
    (function,) = {
        getattr(sys.modules[f"circuitsvis.{home}"], name)
        for home in homes
        if callable(getattr(sys.modules[f"circuitsvis.{home}"], name, None))
    }
    drawn = function(**arguments(lens, name)).local_src
    assert "<script" in drawn and lens.tokens[0][4] in drawn
