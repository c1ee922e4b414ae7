"""The command line, as a person and as a pipeline uses it."""

import functools
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings

import pytest
import torch

import tensorlens_tl
from tensorlens_tl import attribution, circuits, demo, evaluation, graph, hosts, methods
from tensorlens_tl.cli import choices, main
from tensorlens_tl.cli.arguments import parse
from tensorlens_tl.cli.commands import warned
from tensorlens_tl.cli.explanation import unknown_words
from tensorlens_tl.evaluation.report import Evaluation

PROMPT, OTHER = "The capital of France is", "The capital of Peru is"
LOAD = functools.cache(demo.load_model)
DUMPED = "import json, sys; from tensorlens_tl.cli import main\n"


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    """The model is loaded once for all tests, and standard input is empty."""
    monkeypatch.setattr(demo, "load_model", LOAD)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def said(capsys, *args):
    """What a call prints; it succeeds."""
    assert main(list(args)) == 0
    return capsys.readouterr().out


def reports(capsys, *args):
    return json.loads(said(capsys, *args, "--json"))


# --- Without torch --------------------------------------------------------------------------------

REFUSED = {
    "--by hed": "--by 'hed' does not exist. Did you mean head?",
    "--by xyz": "--by 'xyz' does not exist. Use one of token, constant, layer",
    "--by token,hed": "--by 'hed' does not exist",
    "--bt head": "There is no option --bt. Did you mean --by?",
    "--n 3": "There is no option --n. It is an option of evaluate and discover and circuit, not of",
    "--unheard-of": "a prompt that begins so goes behind --",
    "--top 0": "--top '0' is not a whole number ≥ 1. Pass one such as 8",
    "--top many": "--top 'many' is not a whole number ≥ 1",
    "--kind hook": "--kind 'hook' does not exist. Did you mean hooked?",
    "--dtype bfloat61": "--dtype 'bfloat61' does not exist. Did you mean bfloat16?",
    "--file": "--file expected one argument",
    "--file /no/such": "--file /no/such cannot be read, as there is no such file",
    "--file x y": "PROMPT and --file were both given",
    "--file /": "--file / cannot be read",
    f"--file {os.devnull}": "There are no prompts. Pass them as arguments, or one per line",
    "--json --html": "not allowed with argument --json",
    "--output /no/such/x.html y": "--output /no/such/x.html cannot be written",
    "--model /no/such x": "--model /no/such is not a folder or a GGUF file. Pass a hub name",
    "--model . x": "--model . is not a model, as it has no config.json",
    "--model somebody/a-model": "There are no prompts",
    "--ids": "--ids needs prompts",
    "--ids 5 Paris": "--ids takes whole numbers, and 'Paris' is not one",
    "--qk": "--qk is for --by edge",
    "--effect total --by token": "--effect total is not available for --by token",
    "--by mlp": "--effect direct is not available for --by mlp. Use --by with token, constant",
    "--effect half": "--effect 'half' does not exist",
    "discovr": "'discovr' may be a command or a prompt. Did you mean tensorlens-tl discover? For",
    "edti": "'edti' may be a command or a prompt. Did you mean tensorlens-tl edit? For the",
    "eval": "Did you mean tensorlens-tl evaluate? For the prompt, write tensorlens-tl explain eval",
    "help": "Did you mean tensorlens-tl --help?",
    "--pos x y": "--pos 'x' is not a whole number",
    "--pso 2 y": "There is no option --pso. Did you mean --pos?",
    "--vers Rome y": "There is no option --vers. Did you mean --versus?",
    "--to Rome y": "There is no option --to. It is an option of edit, not of explain",
    "--html /no/x.html y": "--html /no/x.html cannot be written",
    "edit --to Rome --margin nan x": "--margin 'nan' is not a number. Pass one such as",
    "edit --to Rome --margin 0 x": "--margin '0' is not above 0. Pass a lead such as 1",
    "discover --threshold inf": "--threshold 'inf' is not a number. Pass one such as 0.05",
    "--top 3 evaluate": "Did you mean tensorlens-tl evaluate? For the prompt, write tensorlens-tl",
    "x ": "PROMPT 2 is empty",
    "evaluate --methods roll": "--methods 'roll' does not exist. Did you mean rollout?",
    "evaluate --methods norm,roll": "--methods 'roll' does not exist",
    "evaluate --protocol perturb": "--protocol 'perturb' does not exist. Did you mean perturbation",
    "evaluate --masking blur": "--masking 'blur' does not exist. Use one of delete, token, mean",
    "evaluate --preset atad": "--preset 'atad' does not exist",
    "evaluate --metric logits": "--metric 'logits' does not exist. Did you mean logit?",
    "evaluate --task ioj": "--task 'ioj' does not exist. Did you mean ioi?",
    "evaluate --n 0": "--n '0' is not a whole number ≥ 1",
    "evaluate --seed -1": "--seed '-1' is not a whole number ≥ 0",
    "evaluate --by head": "There is no option --by. It is an option of explain, not of evaluate",
    "discover --selection best": "--selection 'best' does not exist",
    "discover --threshold big": "--threshold 'big' is not a number. Pass one such as 0.05",
    "discover --n-edges 3 --threshold 1": "not allowed with argument --n-edges",
    "discover a --corrupted /no": "--corrupted /no cannot be read",
    f"discover a --corrupted {os.devnull}": "has 0 lines for 1 prompts. Write one corrupted",
    "circuit": "The following arguments are required: FILE.",
    "edit Paris": "The following arguments are required: --to.",
    "edit --to Rome --target Paris x": "--target and --versus are not used by edit. Pass --to",
    "circuit /no/such": "FILE /no/such cannot be read",
    f"circuit {os.devnull} a": "PROMPT is for --test. Add --test, or drop PROMPT",
    f"circuit {os.devnull} --ablation none": "--ablation 'none' does not exist",
    f"circuit {os.devnull} --test a": "--ablation resample needs --corrupted FILE",
    f"circuit {os.devnull} --corrupted x --ablation zero": "is not used by --ablation zero",
}
HELP = {
    "--help": ("commands:", "examples:", "--effect", "tensorlens-tl explain discover"),
    "evaluate --help": ("--protocol", "leave_one_out"),
    "discover --help": ("--corrupted", "--n-edges"),
    "edit --help": ("--to", "--margin"),
    "circuit --help": ("FILE [PROMPT ...]", "--ablation"),
    "--version": (f"tensorlens-tl {tensorlens_tl.__version__} (transformer-lens ",),
}


@pytest.fixture(scope="module")
def static():
    """(status, output, errors) of each line in one process, which has no torch in the end."""
    code = f"""
import contextlib, io, json, sys
from tensorlens_tl.cli import main
found = {{}}
for line in {[*REFUSED, *HELP]!r}:
    out, err, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO("")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(line.split(" "))
        except SystemExit as exit:
            status = exit.code
    found[line] = status, out.getvalue(), err.getvalue()
print(json.dumps(found))
print([m for m in ("torch", "transformer_lens", "transformers", "numpy") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, modules = out.stdout.splitlines()
    assert modules == "[]"
    return json.loads(found)


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_wrong_as_typed_is_told_before_torch_is_imported(line, static):
    status, out, err = static[line]
    assert (status, out) == (2, "") and REFUSED[line] in err
    assert err.startswith("tensorlens-tl: ") and err.count("\n") == 1


@pytest.mark.parametrize("line", HELP)
def test_help_and_version_need_no_torch(line, static):
    status, out, err = static[line]
    assert (status, err) == (0, "") and all(part in out for part in HELP[line])


def test_names_are_those_of_the_library():
    assert choices.BY == attribution.splits.BY
    assert choices.TOTALS == attribution.splits.TOTALS
    assert choices.KINDS == hosts.loading.KINDS
    assert tuple(methods.METHODS) == choices.METHODS
    assert tuple(evaluation.protocols.PROTOCOLS) == choices.PROTOCOLS
    assert tuple(evaluation.protocols.PRESETS) == choices.PRESETS
    assert choices.MASKINGS == evaluation.masking.MASKINGS
    assert choices.METRICS == evaluation.masking.METRICS
    assert choices.SELECTIONS == graph.selection.SELECTIONS
    assert choices.ABLATIONS == circuits.ablation.ABLATIONS
    assert choices.ATTENTION == circuits.ablation.ATTENTION
    assert choices.TASKS == demo.TASKS
    assert all(getattr(torch, name).is_floating_point for name in choices.DTYPES)


# --- Explain --------------------------------------------------------------------------------------


def test_standard_input_is_read_as_any_system_writes_it(capsys, monkeypatch):
    """As ``python -m tensorlens_tl``: text from Windows is the text, without its marks."""
    data = b"\xef\xbb\xbf" + f"{PROMPT}\r\n\r\n{OTHER} ".encode()
    monkeypatch.setattr("sys.argv", ["tensorlens_tl", "--by", "token", "--json"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    monkeypatch.delitem(sys.modules, "tensorlens_tl.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tensorlens_tl", run_name="__main__")
    assert not ended.value.code
    first, second = json.loads(capsys.readouterr().out)
    assert first["prompt"] == PROMPT and first["tokens"] == ["<bos>", *PROMPT.split()]
    assert second["prompt"] == f"{OTHER} " and second["target"] == "'Lima'"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_files_of_any_system_hold_the_same_prompts(command, mark, end, tmp_path, monkeypatch):
    from tensorlens_tl.cli.arguments import parse
    from tensorlens_tl.cli.prompt_input import read_prompts

    text = f"{end}{PROMPT}{end}{end} a\x0bb\u2028c {end}{OTHER}".encode()
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + text)
    prompts = [PROMPT, " a\x0bb\u2028c ", OTHER]
    assert read_prompts(parse([command, "--file", str(file)])) == prompts
    for line in ([command], [command, "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(mark + text)))
        assert read_prompts(parse(line)) == prompts
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot be read .* Pass a text in UTF-8\."):
        read_prompts(parse([command, "--file", str(file)]))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ValueError, match=r"Standard input cannot be read .* UTF-8\."):
        read_prompts(parse([command]))


def test_the_report(capsys):
    lines = said(capsys, "--model", str(demo.model_folder()), PROMPT).splitlines()
    assert lines[0].startswith("TensorLens(model, 6 tokens") and lines[2] == PROMPT
    for part in ("By token (its", "By component (direct effect)", "Sum by token: ", "  L3MLP  "):
        assert any(line.startswith(part) for line in lines), part
    assert "capture check" in lines[-1] and "attribution error" in lines[-1]


def test_several_prompts_are_a_list_in_their_order(capsys):
    first, second = reports(capsys, PROMPT, "--by", "token", OTHER)
    assert (first["prompt"], second["prompt"]) == (PROMPT, OTHER)
    assert (first["target"], second["target"]) == ("'Paris'", "'Lima'")
    assert reports(capsys, "--by", "token", OTHER) == [second]
    text = said(capsys, "--by", "token", PROMPT, OTHER)
    assert text.count("TensorLens(") == 2 and text.index("'Paris'") < text.index("'Lima'")


def test_every_split_is_the_library_s(capsys):
    (report,) = reports(capsys, "--by", ",".join(choices.BY), PROMPT)
    _, lens = tensorlens_tl.capture(LOAD(), PROMPT)
    for by in choices.BY:
        table = lens.attribute(by=by)
        shown = {row["label"]: row["value"] for row in report["rows"][by]}
        assert shown == pytest.approx(
            dict(zip(table.labels[0], table.values[0].tolist(), strict=True))
        )
        assert (by in report["sums"]) == table.sums_to_target
        if table.sums_to_target:
            assert report["sums"][by] == pytest.approx(report["target_value"])
    text = said(capsys, "--by", "edge", "--qk", "--top", "3", PROMPT)
    assert "By edge (direct effect)" in text and "attribution error" not in text
    table = lens.attribute(by="edge", qk=True)
    assert f"  {table.top(1)[0][0]} " in text and f"… {len(table.sources) - 3} more" in text


def test_total_effects(capsys):
    (report,) = reports(capsys, "--effect", "total", PROMPT)
    _, lens = tensorlens_tl.capture(LOAD(), PROMPT)
    table = lens.attribute(by="component", effect="total")
    assert list(report["rows"]) == ["component"] and report["sums"] == {}
    assert [r["value"] for r in report["rows"]["component"]] == pytest.approx(
        table.values[0].tolist()
    )


def test_targets_by_name_and_id(capsys):
    number = LOAD().to_single_token("Rome")
    named, numbered = (
        reports(capsys, "--by", "token", f"--target={t}", "--versus", "Paris", PROMPT)
        for t in ("Rome", f"#{number}")
    )
    assert named == numbered and named[0]["target"] == "'Rome' − 'Paris'"


def test_a_prompt_that_is_a_command_s_name(capsys):
    for line in ("explain --json discover", "--json -- discover", "--json -- --by"):
        found = json.loads(said(capsys, *line.split()))
        assert [report["prompt"] for report in found] == [line.split()[-1]]
    both = json.loads(said(capsys, "explain", "discover", "--json", "--", "--top"))
    assert [report["prompt"] for report in both] == ["discover", "--top"]


def test_token_ids_and_a_model_without_a_tokenizer(tmp_path, capsys):
    (report,) = reports(capsys, "--ids", "--by", "token", "1 5, 17")
    _, lens = tensorlens_tl.capture(LOAD(), [1, 5, 17])
    assert report["prompt"] == [1, 5, 17] and report["tokens"] == list(lens.tokens[0])
    for file in demo.model_folder().glob("*"):
        if file.name in ("config.json", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    model = ["--model", str(tmp_path), "--by", "token"]
    assert main([*model, PROMPT]) == 2
    assert "has no tokenizer, so it reads no text. Pass token ids: --ids" in capsys.readouterr().err
    (bare,) = reports(capsys, *model, "--ids", "1 5 17")
    best = int(tensorlens_tl.capture(LOAD(), [1, 5, 17])[0][0, -1].argmax())
    assert bare["predictions"][0]["token"] == f"#{best}"
    values, others = ([row["value"] for row in r["rows"]["token"]] for r in (bare, report))
    assert sum(values) == pytest.approx(sum(others), rel=1e-5)
    assert "1 5 17" in said(capsys, *model, "--ids", "1 5 17")


def test_errors_of_the_model_name_the_prompt(capsys):
    assert main([PROMPT, " ".join(["The"] * 99)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Prompt 2 ('The The The" in captured.err.splitlines()[-1]
    assert main(["--target", "Zurich", PROMPT]) == 2
    assert "tensorlens-tl: --target 'Zurich' is not known to the" in capsys.readouterr().err


def test_a_hub_name_that_cannot_be_reached(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main(["--model", "somebody/a-model", PROMPT]) == 2
    assert (
        "'somebody/a-model' is no folder here, and the model hub cannot" in capsys.readouterr().err
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_unknown_words_are_named(capsys):
    class Tokenizer:
        unk_token_id = 0

        def encode(self, word, add_special_tokens):
            return [0 if word == "zyzzy" else 1]

    assert unknown_words(Tokenizer(), "a zyzzy b zyzzy") == ["zyzzy"]
    Tokenizer.unk_token_id = None
    assert unknown_words(Tokenizer(), "a zyzzy") == []
    assert main(["--by", "token", "The zyzzy"]) == 0
    assert "warning: the tokenizer does not know zyzzy" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    assert main(["--by", "token", PROMPT]) == 0
    assert "BrokenPipe" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shows_the_models_own_noise(dtype, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_model", LOAD.__wrapped__)  # its weights are cast
    (report,) = reports(capsys, "--dtype", dtype, PROMPT)
    assert 0 < report["completeness_error"] <= 2 * report["noise_floor"] < 0.1
    assert f"(model's own {dtype} noise {report['noise_floor']:.0e})" in report["exactness"]
    assert report["exactness"] in report["lens"]


# --- Files ----------------------------------------------------------------------------------------


def test_output_and_its_forms(tmp_path, capsys):
    text = said(capsys, "--by", "head,token", PROMPT)
    data = said(capsys, "--by", "head,token", PROMPT, "--json")
    page = said(capsys, "--by", "head,token", PROMPT, "--html")
    for name, options, expected in (
        ("a.txt", [], text),
        ("a.json", [], data),
        ("b.txt", ["--json"], data),
        ("a.html", [], page),
        ("b.json", ["--html"], page),
    ):
        path = str(tmp_path / name)
        assert said(capsys, "--by", "head,token", PROMPT, "--output", path, *options) == ""
        assert (tmp_path / name).read_text(encoding="utf-8") == expected
    data = page_data(page)
    headings = [view["heading"] for view in data["views"]]
    for name in ("Predictions", "By head, direct", "By token, direct", "Through depth"):
        assert any(heading.startswith(name) for heading in headings), name
    assert data["title"] == f"<bos> {PROMPT}" and not data["tabs"]
    assert any("completeness error" in note for note in data["notes"])
    assert "http:" not in page.replace("http://www.w3.org", "") and "https:" not in page
    assert "<bos>" not in page


def page_data(page):
    """What a page holds."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_page_file_may_follow_its_option(tmp_path, capsys):
    path = str(tmp_path / "a.html")
    assert said(capsys, "--by", "token", "--html", path, PROMPT, OTHER) == ""
    data = page_data((tmp_path / "a.html").read_text(encoding="utf-8"))
    tabs = list(dict.fromkeys(view["tab"] for view in data["views"]))
    assert tabs == [f"1: <bos> {PROMPT}", f"2: <bos> {OTHER}"] and data["tabs"]
    # Any other word behind --html is a prompt.
    assert page_data(said(capsys, "--html", PROMPT))["title"] == f"<bos> {PROMPT}"


# --- Evaluate -------------------------------------------------------------------------------------


def test_evaluate_prints_the_table_and_nothing_else(tmp_path, capfd):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n{OTHER}\n")
    assert main(["evaluate", "--methods", "in_out,rollout", "--file", str(file)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("Evaluation of 2 methods on 2 prompts of tensorlens_tl demo")
    assert lines[2].split("  ")[0] == "masked by delete" and lines[-1].startswith("rollout")


def test_evaluate_gives_json_for_pipelines(capsys):
    args = ["--protocol", "eraser", "leave_one_out", "--masking", "token,mean", "--methods", "norm"]
    text = said(
        capsys, "evaluate", *args, PROMPT, "--versus", "runner_up", "--keep-last", "--json", OTHER
    )
    found = Evaluation.from_json(text)
    assert len(found) == 2 and found.versus == "runner_up" and found.keep_last
    measures = {"comprehensiveness", "sufficiency", "leave_one_out"}
    assert {row.measure for row in found.rows} == measures
    assert {row.masking for row in found.rows} == {"token", "mean"}


def test_evaluate_draws_the_demo_s_own_prompts(capsys):
    text = said(capsys, "evaluate", "--task", "facts", "--n", "3", "--methods", "random")
    assert "of 1 method on 3 prompts" in text


def test_evaluate_s_own_errors(capsys):
    assert main(["evaluate", "--target", "John", PROMPT]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--target 'John' is predicted by no prompt" in captured.err
    assert "Drop --target to use the model's own predictions." in captured.err


# --- Circuits -------------------------------------------------------------------------------------


def test_a_circuit_is_found_kept_shown_and_tested(tmp_path, capsys):
    path, corrupted = tmp_path / "circuit.json", tmp_path / "corrupted.txt"
    pairs = demo.prompts("ioi", 3)
    texts, others = [p.clean for p in pairs], [p.corrupted for p in pairs]
    corrupted.write_text("\n".join(others))
    line = ["discover", "--n-edges", "24", "--output", str(path)]
    assert said(capsys, *line, "--n", "3") == ""
    found = circuits.Circuit.from_json(path.read_text())
    expected = tensorlens_tl.discover(LOAD(), texts, others, n_edges=24)
    assert found == expected
    assert said(capsys, *line, "--corrupted", str(corrupted), *texts) == ""
    assert circuits.Circuit.from_json(path.read_text()) == expected

    shown = said(capsys, "circuit", str(path), "--top", "2").splitlines()
    order = sorted(expected.edges, key=lambda edge: -abs(expected.scores[edge]))
    assert shown[0] == repr(expected).splitlines()[0] and shown[-1] == "  … 22 more"
    assert [line.split()[-1] for line in shown[1:3]] == [str(edge) for edge in order[:2]]
    graph_file = tmp_path / "circuit.dot"
    assert said(capsys, "circuit", str(path), "--output", str(graph_file)) == ""
    assert graph_file.read_text() == expected.to_dot() + "\n"

    proof = json.loads(said(capsys, "circuit", str(path), "--test", "--n", "3", "--json"))
    ours = expected.faithfulness(LOAD(), texts, others)
    assert proof["share"] == pytest.approx(ours.share)
    zero = ["circuit", str(path), "--test", "--ablation", "zero", "--attention", "frozen", *texts]
    ours = expected.faithfulness(LOAD(), texts, ablation="zero", attention="frozen")
    assert said(capsys, *zero).strip() == repr(ours)

    path.write_text("{}")
    assert main(["circuit", str(path)]) == 2
    assert f"FILE {path}: This text is not a circuit" in capsys.readouterr().err


def test_edit_makes_another_token_win(capsys):
    line = ["edit", "--to", "Rome", "--site", "2", "The capital of France is"]
    assert "'Paris' → 'Rome'" in said(capsys, *line)
    (found,) = json.loads(said(capsys, *line, "--refine", "0", "--json"))
    assert found["site"] == "blocks.2.hook_resid_post" and found["predicted"] > 0
    assert found["top"] == "Paris" and found["before"] < 0
    page = page_data(said(capsys, *line, "--html"))
    assert any(v["heading"].startswith("In the real model: Edit at") for v in page["views"])
    assert main([*line[:2], "Rom", *line[3:]]) == 2
    assert "--to 'Rom' is not known to the tokenizer" in capsys.readouterr().err
    assert "'is' →" in said(capsys, *line, "--pos", "-2", "--refine", "0")


def test_the_first_token_and_the_position_are_chosen(capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_model", LOAD.__wrapped__)
    (found,) = reports(capsys, "--no-bos", "--pos", "1", PROMPT)
    model = LOAD.__wrapped__()
    logits, lens = model.run_with_tensorlens(PROMPT, prepend_bos=False)
    assert found["tokens"] == PROMPT.split()
    assert found["predictions"][0]["logit"] == float(logits[0, 1].detach().max())
    assert found["target_value"] == float(lens.attribute(pos=1).target_value)
    assert main(["--pos", "9", PROMPT]) == 2
    assert "Position 9 is outside prompt 0" in capsys.readouterr().err
    args = parse(["--versus", "b", "a"])
    message = "TransformerLens reads more tokens. Pass prepend_bos=False for the tokenizer's own."
    with warned(args):
        warnings.warn(message, UserWarning, stacklevel=1)
    assert capsys.readouterr().err == (
        "warning: TransformerLens reads more tokens. Pass --no-bos for the tokenizer's own.\n"
    )


def test_pairs_of_a_table_in_a_folder_that_is_resumed(tmp_path, capsys):
    pairs = demo.prompts("ioi", 2)
    rows = [f'"{p.clean}","{p.corrupted}"," {p.answer}"' for p in pairs]
    table, folder = tmp_path / "pairs.csv", tmp_path / "run"
    table.write_text("\n".join(["prompt,corrupted,target", *rows]))
    args = ["discover", "--data", str(table), "--resume", str(folder), "--n-edges", "9", "--json"]
    assert main(args) == 0
    first = capsys.readouterr().out
    assert (
        len(tensorlens_tl.Circuit.from_json(first)) == 9
        and (folder / "00000000.safetensors").exists()
    )
    assert main(args) == 0 and capsys.readouterr().out == first
    table.write_text("\n".join(["prompt,corrupted,target", rows[0], '"a b",,"c"']))
    assert main(args) == 2 and "has no corrupted in row 2" in capsys.readouterr().err
    table.write_text("text\na b")
    assert main(args) == 2 and "has no column prompt" in capsys.readouterr().err
    assert main([*args, "--target", "Mary"]) == 2
    assert "--data and --target were both given" in capsys.readouterr().err
