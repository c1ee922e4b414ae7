"""Options of wrong types and names are refused as typed, whatever function they are given to."""

from functools import cache

import pytest

import tensorlens_tl
from tensorlens_tl import AblationOptions, demo
from tensorlens_tl.evaluation import evaluate

pytestmark = pytest.mark.wrong_types


@cache
def ioi():
    """A model, two prompts and their corrupted prompts, and the first prompt's lens."""
    model, pairs = demo.load_model(), demo.prompts("ioi", 2)
    texts = [p.clean for p in pairs]
    return model, texts, [p.corrupted for p in pairs], tensorlens_tl.capture(model, texts[0])[1]


def ablated(circuit=("L0H0",), **options):
    model, texts, corrupted, _ = ioi()
    return tensorlens_tl.faithfulness(model, texts, circuit, corrupted, **options)


def many(circuits):
    model, texts, corrupted, _ = ioi()
    return tensorlens_tl.faithfulness_of_many(model, texts, circuits, corrupted)


def curve(ranking=("L0H0→logits",), **options):
    model, texts, corrupted, _ = ioi()
    return tensorlens_tl.faithfulness_curve(model, texts, ranking, corrupted, **options)


def discover(**options):
    model, texts, corrupted, _ = ioi()
    return tensorlens_tl.discover(model, texts, corrupted, **options)


def matrix(*args, **options):
    return ioi()[3].token_matrix(*args, **options)


def evaluated(methods="random", *args, **options):
    model, texts, _, _ = ioi()
    return evaluate(model, texts, methods, *args, **options)


NOT_OPTIONS = r"is not AblationOptions\. Pass AblationOptions\(…\), or its fields as arguments"
NO_INTEGER = "is not an integer. Pass a whole number, such as 0"
REFUSED = [
    (AblationOptions, {"seed": "a"}, f"seed='a' {NO_INTEGER}"),
    (AblationOptions, {"seed": True}, f"seed=True {NO_INTEGER}"),
    (AblationOptions, {"pos": "last"}, "pos='last' is not an integer. Pass one: -1 is the last"),
    (AblationOptions, {"metric": "logit"}, "metric='logit' is not a function. Pass a function of"),
    (AblationOptions, {"ablation": ["zero"]}, r"ablation=\['zero'\] does not exist. Use one of"),
    (ablated, {"options": {"ablation": "zero"}}, r"options={'ablation': 'zero'} " + NOT_OPTIONS),
    (ablated, {"options": None}, f"options=None {NOT_OPTIONS}"),
    (ablated, {"ablatoin": "zero"}, r"no option ablatoin=\. Did you mean ablation=\?"),
    (curve, {"options": "zero"}, f"options='zero' {NOT_OPTIONS}"),
    (curve, {"sizes": ("a",)}, r"sizes=\('a',\) are not increasing shares of all edges"),
    (curve, {"ranking": 5}, "ranking=5 does not rank edges. Pass scores by edge, or a list"),
    (curve, {"ranking": "L0H0"}, "ranking='L0H0' does not rank edges"),
    (curve, {"ranking": {"L0H0→logits": "a"}}, "ranking holds L0H0→logits with the score 'a', but"),
    (curve, {"ranking": [5]}, "ranking holds 5 with the score 0.0, but needs an edge and a number"),
    (many, {"circuits": [["L0H0"]]}, "circuits is a list, not a dictionary .* Pass {'mine': circu"),
    (many, {"circuits": "L0H0"}, "circuits is a str, not a dictionary"),
    (discover, {"threshold": "big"}, "threshold='big' is not a finite number. Pass one such as"),
    (discover, {"threshold": True}, "threshold=True is not a finite number"),
    (discover, {"threshold": float("nan")}, "threshold=nan is not a finite number"),
    (discover, {"n_edges": 3, "seed": [1]}, rf"seed=\[1\] {NO_INTEGER}"),
    (discover, {"n_edges": 3, "path": 3}, "path=3 is not a path. Pass a string or a pathlib.Path"),
    (matrix, {"name": ["norm"]}, r"There is no method \['norm'\]\. Choose one of norm, in, out"),
    (matrix, {"name": "norm", "seed": "a"}, f"seed='a' {NO_INTEGER}"),
    (matrix, {"name": "norm", "precision": ["bfloat16"]}, "precision must be 'bfloat16' or None"),
    (matrix, {"name": "random", "seed": "a"}, f"seed='a' {NO_INTEGER}"),
    (evaluated, {"methods": 3}, "methods=3 is not a name or a list of names. Pass one of them"),
    (evaluated, {"protocol": 3}, "protocol=3 is not a name or a list of names"),
    (evaluated, {"masking": 3}, "masking=3 is not a name or a list of names"),
    (evaluated, {"preset": 3}, "preset=3 is not at least two fractions between 0 and 1"),
    (evaluated, {"preset": ["a", "b"]}, r"preset=\['a', 'b'\] is not at least two fractions"),
    (evaluated, {"seed": "a"}, f"seed='a' {NO_INTEGER}"),
    (evaluated, {"protocol": "naopc", "beam": "x"}, "beam='x' keeps no order in the search"),
    (evaluated, {"options": {"random": 3}}, "options={'random': 3} is not a dictionary of dict"),
    (evaluated, {"options": [("norm", {})]}, "Pass options by method: {'norm': {'probes': 16}}"),
]


@pytest.mark.parametrize(
    ("call", "options", "message"), REFUSED, ids=[f"{c.__name__} {o}" for c, o, _ in REFUSED]
)
def test_options_of_wrong_types_are_refused_as_typed(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_numbers_of_numpy_and_options_as_they_should_be_are_taken():
    numpy = pytest.importorskip("numpy")
    assert ablated(seed=numpy.int64(3), pos=numpy.int64(-1)).seed == 3
    assert ablated(options=AblationOptions(seed=2)).seed == 2
    ranking = {"L0H0→logits": numpy.float32(1), "L1H0→logits": 2}
    sizes = numpy.array([0.5, 1.0])
    assert curve(ranking, sizes=sizes).n_edges[0] > 2
    assert len(discover(threshold=numpy.float64(1e9))) == 0
