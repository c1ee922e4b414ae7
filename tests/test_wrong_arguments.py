"""Wrong arguments at every public call: a ValueError that names the argument as it was typed."""

import inspect
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from models import quiet

import tensorlens_tl as tl
from tensorlens_tl import demo, evaluation, relations

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"


@cache
def given():
    """What the calls below start from."""
    with quiet(), torch.no_grad():
        model = demo.load_model()
        lens, other = (tl.capture(model, text)[1] for text in (FRANCE, ITALY))
        return SimpleNamespace(
            model=model,
            lens=lens,
            other=other,
            rows=lens.attribute("Paris"),
            edges=lens.attribute("Paris", by="edge"),
            circuit=lens.discover("Paris", n_edges=20),
            op=lens.operator,
            narrow=lens.embedding[..., :3],
        )


class Table(list):
    """Like a data frame, which has columns."""

    columns = ("clean",)


def evaluate(g, **changes):
    arguments = {"model": g.model, "prompts": [FRANCE], "methods": ["in_out"]}
    return evaluation.evaluate(**{**arguments, **changes})


WRONG = {
    # The model, and how it is captured
    "model=None": (lambda g: tl.capture(None, FRANCE), "model is None, which is neither"),
    "model=7": (lambda g: tl.capture(7, FRANCE), "model is an int, which is neither"),
    "a name": (lambda g: tl.capture("gpt2", FRANCE), "model is 'gpt2', which is the name"),
    "wrap(None)": (lambda g: tl.wrap(None), "model is None, which is neither"),
    "wrap(7)": (lambda g: tl.wrap(7), "model is an int, which is neither"),
    "wrap(Linear)": (lambda g: tl.wrap(torch.nn.Linear(2, 2)), "model is a Linear"),
    "gate": (lambda g: tl.capture(g.model, FRANCE, gate="both"), "gate='both' is not known"),
    "pattern": (lambda g: tl.capture(g.model, FRANCE, pattern="kept"), "pattern='kept' is not"),
    "dtype": (lambda g: tl.capture(g.model, FRANCE, dtype="float32"), "dtype='float32' is no"),
    "prepend_bos": (
        lambda g: tl.capture(g.model, FRANCE, prepend_bos="yes"),
        "prepend_bos='yes' is not known. Pass one of None, True, False",
    ),
    "padding_side": (
        lambda g: tl.capture(g.model, FRANCE, padding_side="middle"),
        "padding_side='middle' is not known. Pass one of None, 'left', 'right'",
    ),
    "tokenizer": (
        lambda g: tl.capture(g.model, FRANCE, tokenizer=object()),
        "tokenizer is for Hugging Face models only",
    ),
    "logits_to_keep": (
        lambda g: tl.capture(g.model, FRANCE, logits_to_keep=1),
        "logits_to_keep would change what is run",
    ),
    "load_model(None)": (lambda g: tl.load_model(None), "name_or_folder=None is not a path"),
    "load_model(7)": (lambda g: tl.load_model(7), "name_or_folder=7 is not a path"),
    "load_model, kind": (
        lambda g: tl.load_model(str(demo.model_folder()), kind="both"),
        "kind='both' is no class of host models",
    ),
    "load_model, dtype": (
        lambda g: tl.load_model(str(demo.model_folder()), dtype="float99"),
        "dtype='float99' is no dtype",
    ),
    "load_model, a misspelt name": (
        lambda g: tl.load_model(str(demo.model_folder()), dtyp="float32"),
        "dtyp='float32' is no argument of load_model or .* Use some of kind, .*dtype",
    ),
    "load_model, device": (
        lambda g: tl.load_model(str(demo.model_folder()), device="nowhere"),
        "device='nowhere' is no device",
    ),
    # Attribution
    "target": (lambda g: g.lens.attribute({}), r"target=\{\} of type dict is no token"),
    "target, floats": (lambda g: g.lens.attribute(1.5), "target=1.5"),
    "target, an id": (lambda g: g.lens.attribute(-99999), "target=-99999 is outside"),
    "versus": (lambda g: g.lens.attribute("Paris", ""), "versus='' is not known"),
    "pos": (lambda g: g.lens.attribute("Paris", pos=99), "Position 99 is outside prompt 0"),
    "pos, a word": (lambda g: g.lens.attribute("Paris", pos="last"), "Position 'last' is not"),
    "by": (lambda g: g.lens.attribute(by="tokens"), "by='tokens' does not exist"),
    "by, of features": (lambda g: g.lens.attribute(by="sae"), 'or by="feature" with saes='),
    "several targets": (
        lambda g: g.lens.attribute(["Paris", "Rome"]),
        r"target=\['Paris', 'Rome'\] names several tokens. Pass one, or one per prompt; attr",
    ),
    "by, a list": (lambda g: g.lens.attribute(by=["token"]), r"by=\['token'\] does not exist"),
    "effect": (lambda g: g.lens.attribute(by="head", effect="both"), "effect='both'"),
    "at": (lambda g: g.lens.attribute(at="secant"), "at='secant' needs a baseline"),
    "at, unknown": (
        lambda g: g.lens.attribute(by="component", baseline=g.other, at="x"),
        "at='x' does not exist",
    ),
    "qk": (lambda g: g.lens.attribute(qk=True), "qk=True is not available"),
    "lists": (lambda g: g.lens.attribute_many(["Paris"], [0, 1]), "The lists cannot be paired"),
    "no positions": (lambda g: g.lens.attribute_many(pos=[]), "pos has 0 entries"),
    "k": (lambda g: g.lens.paths("Paris", k=0), "k=0 is not an integer ≥ 1"),
    "from_token": (lambda g: g.lens.paths("Paris", from_token=99), "Position 99 is outside"),
    "max_expansions": (lambda g: g.lens.paths(max_expansions="x"), "max_expansions='x' is not"),
    "memory_limit": (lambda g: g.lens.paths(memory_limit="x"), "memory_limit='x' is not"),
    "source": (lambda g: g.lens.loadings("L9H9", "Paris"), "L9H9"),
    "source, None": (lambda g: g.lens.loadings(None, "Paris"), "Position None is not an integer"),
    "a word as a path": (
        lambda g: g.lens.paths("Paris", k=2)["x"],
        r"paths\['x'\] does not exist, as the index is a path's number or a slice. Pass an integer",
    ),
    "a word as a prompt": (
        lambda g: g.lens.capture.prompt("x"),
        r"capture.prompt\['x'\] does not exist, as the index is a prompt's number",
    ),
    "top": (lambda g: g.rows.top(0), "k=0 is not an integer ≥ 1"),
    "axis": (lambda g: g.rows.sum("word"), "There is no axis 'word'"),
    "dest": (lambda g: g.edges.select(dest="L9H9"), "L9H9"),
    "select(layer=)": (lambda g: g.edges.select(layer=99), "No row has layer 99"),
    "a word as index": (lambda g: g.rows["Mary"], r"attribution\['Mary'\] does not exist"),
    "attribution from_json": (lambda g: tl.Attribution.from_json("{}"), "not an attribution"),
    "a short name": (
        lambda g: g.lens.attribute("Paris", vs="Rome"),
        r"There is no argument vs= of attribute. Did you mean versus=\?",
    ),
    "a name that is far": (
        lambda g: g.lens.paths("Paris", n=3),
        "There is no argument n= of paths. Use target, k, versus, pos, .*progress",
    ),
    "a name that would be passed on": (
        lambda g: tl.capture(g.model, FRANCE, patern="stored"),
        r"There is no argument patern= of capture. Did you mean pattern=\?",
    ),
    "too little": (
        lambda g: g.op.block(2),
        "The call does not fit block: missing a required argument: 'key_pos'. Its arguments are",
    ),
    "too much": (
        lambda g: g.lens.attribute("Paris", *range(12)),
        "The call does not fit attribute: too many positional arguments. Its arguments are target",
    ),
    "nothing to run": (
        lambda g: g.model.run_with_tensorlens(),
        "does not fit run_with_tensorlens: missing a required argument: 'input'",
    ),
    "a number to run": (
        lambda g: g.model.run_with_tensorlens(5),
        "The input is 5, one value, not a list of ids. Pass a string",
    ),
    "an option": (
        lambda g: tl.AblationOptions(atention="live"),
        r"There is no argument atention= of AblationOptions. Did you mean attention=\?",
    ),
    # The operator and its names
    "@": (lambda g: g.op @ [1.0], "The vector is a list, and not a tensor"),
    "apply": (lambda g: g.op.apply(None), "The vector is None, and not a tensor"),
    "apply, width": (lambda g: g.op.apply(g.narrow), r"The vector is \[1, 6, 3\]"),
    "apply, dtype": (lambda g: g.op.apply(g.lens.embedding.double()), "of torch.float64 on cpu"),
    "apply_t": (lambda g: g.op.apply_t("x"), "The vector is a str, and not a tensor"),
    "pull": (lambda g: g.op.pull(g.narrow), r"The vector is \[1, 6, 3\]"),
    "trace": (lambda g: g.op.trace(3), "The vector is an int, and not a tensor"),
    "trace_t": (lambda g: g.op.trace_t(g.narrow), r"The vector is \[1, 6, 3\]"),
    "readout": (lambda g: g.lens.readout([1.0]), "The vector is a list, and not a tensor"),
    "block": (lambda g: g.op.block(99, 0), "Position 99|99"),
    "svd": (lambda g: g.op.svd(0), "k=0 does not fit"),
    "to_dense": (lambda g: g.op.to_dense(0), "memory_limit=0 is not"),
    "restrict": (lambda g: g.op.restrict(3), "3 is not a list of nodes or edges"),
    "between": (lambda g: g.lens.between("x", "unembed.hook_in"), "no residual site 'x'"),
    "dot_test": (lambda g: tl.dot_test("T"), "op is a str, and not a map"),
    "dot_test, seed": (lambda g: tl.dot_test(g.op, "x"), "seed='x' is not an integer"),
    "Node": (lambda g: tl.Node.parse(3), "3 is not a node"),
    "Edge": (lambda g: tl.Edge.parse(None), "None is not an edge"),
    "Edge, backwards": (lambda g: tl.Edge.parse("logits→L0H0"), "is not an edge"),
    "Convention": (lambda g: tl.Convention("x"), "gate='x' is not known"),
    # Tokens by tokens, plans, files
    "method": (lambda g: g.lens.token_matrix("nrm"), "There is no method 'nrm'"),
    "layers": (lambda g: g.lens.token_matrix("norm", layers=3), "layers must be a pair"),
    "probes": (lambda g: g.lens.token_matrix("norm", probes=1.5), "probes must be an integer"),
    "a method's model": (lambda g: g.lens.token_scores("attnlrp"), "Pass the captured model"),
    "a wrong model": (lambda g: g.lens.token_matrix("attnlrp", model=3), "model is an int"),
    "plan": (lambda g: g.lens.plan("x"), "There is no plan of 'x'"),
    "save": (lambda g: g.lens.save(None), "path=None is not a path"),
    "save, folder": (
        lambda g: g.lens.save("/no/such/lens"),
        "path='/no/such/lens' cannot be written. Pass a file in a folder that exists",
    ),
    "discover's path": (
        lambda g: tl.discover(g.model, [FRANCE], n_edges=5, path=3),
        "path=3 is not a path. Pass a string or a pathlib.Path",
    ),
    "discover's folder": (
        lambda g: tl.discover(g.model, [FRANCE], n_edges=5, path="/no/such/file"),
        "path='/no/such/file' cannot be written. Pass a file in a folder that exists",
    ),
    "load": (lambda g: tl.load(3), "path=3 is not a path"),
    "load, nothing": (lambda g: tl.load("/no/such/lens"), "There is no file /no/such/lens"),
    # Prompts and circuits
    "no prompts": (lambda g: tl.mean_attribution(g.model, []), r"prompts=\[\] is not a non-empty"),
    "batch_size": (lambda g: tl.mean_attribution(g.model, [FRANCE], batch_size=0), "batch_size=0"),
    "path": (lambda g: tl.mean_attribution(g.model, [FRANCE], path=3), "path=3 is not a path"),
    "path, folder": (
        lambda g: tl.mean_attribution(g.model, [FRANCE], path="/no/such/rows"),
        "path='/no/such/rows' cannot be written. Pass a file in a folder that exists",
    ),
    "n_edges": (lambda g: g.lens.discover(n_edges=0), "n_edges=0 is not an integer from 1"),
    "selection": (lambda g: g.lens.discover(n_edges=5, selection="x"), "selection='x' does not"),
    "corrupted": (lambda g: g.lens.discover(n_edges=5, corrupted="x"), "corrupted is a str"),
    "circuit": (lambda g: g.lens.circuit([3]), "3 is neither a node nor an edge"),
    "circuit from_json": (lambda g: tl.Circuit.from_json("x"), "not a circuit of to_json"),
    "resized": (lambda g: g.circuit.resized(n_edges="x"), "n_edges='x' is not an integer"),
    "ablation": (lambda g: tl.AblationOptions(ablation="x"), "ablation='x' does not exist"),
    "metric": (lambda g: tl.AblationOptions(metric="x"), "metric='x' is not a function"),
    "ranking": (
        lambda g: tl.faithfulness_curve(g.model, [FRANCE], 3, [ITALY]),
        "ranking=3 does not rank edges",
    ),
    "corrupted prompts": (
        lambda g: tl.score_edges(g.model, [FRANCE], ["The"], target="Paris"),
        "Prompt 0 has 6 tokens, its corrupted prompt 2",
    ),
    "prompts": (lambda g: tl.discover(g.model, 3, n_edges=5), "prompts=3 is not a non-empty list"),
    "edges": (
        lambda g: tl.faithfulness(g.model, [FRANCE], ["x"], [ITALY]),
        "'x' is not a node",
    ),
    "circuits": (
        lambda g: tl.faithfulness_of_many(g.model, [FRANCE], 3, [ITALY]),
        "circuits is an int, not a dictionary",
    ),
    "all others": (
        lambda g: g.lens.attribute("Paris", versus="all_others"),
        r"versus='all_others' is for evaluate alone\. Pass of='logprob'",
    ),
    # A table iterates over the names of its columns, which would be the prompts
    "a table": (
        lambda g: tl.discover(g.model, Table([FRANCE]), n_edges=5),
        "prompts is a Table, a table. Pass one of its columns",
    ),
    "corrupted as a table": (
        lambda g: tl.faithfulness(g.model, [FRANCE], [], Table([ITALY])),
        "corrupted is a Table, a table. Pass one of its columns",
    ),
    "a table of a study": (lambda g: tl.validity(g.model, Table("abc")), "prompts is a Table, a"),
    "a table of methods": (lambda g: evaluate(g, prompts=Table([FRANCE])), "prompts is a Table"),
    "a table of means": (lambda g: tl.attribute(g.model, Table([FRANCE])), "prompts is a Table"),
    "a metric of logits alone": (
        lambda g: tl.faithfulness(g.model, [FRANCE], [], [ITALY], metric=lambda logits: logits),
        r"does not take two arguments. Pass a function of logits \[prompt, d_vocab\] and indices",
    ),
    "blank": (lambda g: tl.capture(g.model, "   "), "The prompt is empty. Give at least one token"),
    "no arguments": (
        lambda g: g.rows.to_dataframe(prompt=1),
        "no argument prompt= of to_dataframe. Call it without arguments",
    ),
    "no argument": (lambda g: g.circuit.to_graphml("a.graphml"), "It takes no arguments"),
    "a device of no machine": (lambda g: demo.load_model(device="cuda:99"), "cannot be used: "),
    "unwrap": (lambda g: tl.unwrap(3), "This int was not made by tensorlens_tl.wrap"),
    "attribute": (lambda g: tl.attribute(g.model, 3), "prompts=3 is not a non-empty list"),
    # Studies
    "too few prompts": (lambda g: tl.validity(g.model, [FRANCE]), "fewer than three prompts"),
    "prompts=3": (lambda g: tl.validity(g.model, 3), "prompts=3 holds fewer than three prompts"),
    "protocol": (lambda g: evaluate(g, protocol="x"), "'x'"),
    "scores": (lambda g: evaluate(g, scores=3), "scores is an int, not a dictionary"),
    "scores by one name": (
        lambda g: evaluate(g, scores={"mine": 1}),
        r"scores\['mine'\] is an int, not a list. Pass one list",
    ),
    "scores of one prompt": (
        lambda g: evaluate(g, scores={"mine": [1]}),
        r"scores\['mine'\]\[0\] is an int, not a list of numbers. Pass one list for each prompt",
    ),
    "words as scores": (
        lambda g: evaluate(g, scores={"mine": [["a"] * 6]}),
        r"scores\['mine'\]\[0\] is a list, not a list of numbers",
    ),
    "keep_last": (lambda g: evaluate(g, keep_last="x"), "keep_last='x' is not a choice"),
    "evaluate's metric": (lambda g: evaluate(g, metric="x"), "metric='x' does not exist"),
    "relation": (lambda g: demo.relation("x"), "There is no relation 'x'"),
    "Relation.load": (lambda g: relations.Relation.load(None), "path=None is not a path"),
    "task": (lambda g: demo.prompts("x", 3), "'x'"),
    "n": (lambda g: demo.prompts("ioi", -1), "n=-1 is not an integer ≥ 1"),
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    call, match = WRONG[name]
    with quiet(), torch.no_grad(), pytest.raises(ValueError, match=match) as caught:
        call(given())
    assert str(caught.value).count(". ") >= 1, "two sentences: what was wrong, and what to do"


def test_an_index_beyond_the_end_says_how_many_there_are():
    """An IndexError, by which loops end."""
    lens = given().lens
    paths = lens.paths("Paris", k=2)
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"no path {index}. The number of paths is 2"):
            paths[index]
    assert list(paths) == [paths[0], paths[-1]] == list(paths[:9])
    for index in (9, -2):
        with pytest.raises(IndexError, match=rf"no prompt {index}. The number of prompts is 1"):
            lens.capture.prompt(index)
    assert lens.capture.prompt(-1).prompts.strings == lens.capture.prompts.strings


GUESSED = [
    ("lens", "predictions", r"Use lens\.logit_lens\(\)\."),
    ("lens", "to_html", r"Use lens\.report\('report\.html'\), or \.plot\(\) and \.show\(\)"),
    ("lens", "cuda", r"Use lens\.to\('cuda'\)\."),
    ("lens", "model", "Use the model that ran, which a lens does not hold"),
    ("lens", "atribute", r"'TensorLens' object has no attribute 'atribute'. Use attribute\."),
    ("lens", "svd", r"Use lens\.operator\.svd\."),
    ("lens", "load", r"Use tensorlens_tl\.load\."),
    ("rows", "scores", r"Use \.values\."),
    ("circuit", "save", r"Use to_json\."),
    ("lens", "zzz", r"Use a name that dir\(\) lists\."),
    ("rows", "to_pandas", r"Use to_dataframe\."),
    ("rows", "sort", r"Use top\."),
    ("rows", "to_numpy", r"Use numpy\.asarray of it\."),
    ("circuit", "filter", r"Use a name that dir\(\) lists\."),  # a circuit has no select
    ("circuit", "draw", r"Use plot\."),
]


@pytest.mark.parametrize(("what", "name", "match"), GUESSED)
def test_a_guessed_attribute_says_what_is_there(what, name, match):
    thing = getattr(given(), what)
    with pytest.raises(AttributeError, match=match):
        getattr(thing, name)
    assert not hasattr(thing, name) and not hasattr(thing, "__array_interface__")


def test_a_guessed_name_of_the_package_says_where_it_is():
    for name, meant in (
        ("evaluate", "evaluation.evaluate"),
        ("faithfullness", "faithfulness"),
        ("explain", "capture"),
    ):
        with pytest.raises(AttributeError, match=rf"'{name}'\. Use tensorlens_tl\.{meant}\."):
            getattr(tl, name)
    with pytest.raises(AttributeError, match=r"no attribute '_private'$"):
        _ = tl._private


def test_an_error_inside_a_property_is_not_hidden():
    class Broken(type(given().lens)):
        @property
        def odd(self):
            raise AttributeError("of its own")

    with pytest.raises(AttributeError, match="of its own"):
        _ = Broken(given().lens.capture).odd


def test_every_public_function_is_called_wrongly():
    called = {name for call, _ in WRONG.values() for name in call.__code__.co_names}
    public = {name for name in dir(tl) if inspect.isfunction(getattr(tl, name))}
    assert public - called == {"install", "uninstall"}  # take no arguments
