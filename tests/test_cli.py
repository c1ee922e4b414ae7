"""The command line, as a person and as a pipeline uses it."""

import io
import json
import os
import subprocess
import sys

import pytest
from models import SHARED

from tensorlens_tl.__main__ import main, unknown_words
from tensorlens_tl.evaluation.report import Evaluation

FOLDER = SHARED / "stories260K"
PROMPT = "Once upon a time, there was a little girl named"
needs_model = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the shared model")


def run(*args, **kwargs):
    command = [sys.executable, "-m", "tensorlens_tl", *args]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_help_imports_no_host_and_not_even_torch():
    code = (
        "import sys; from tensorlens_tl.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformer_lens') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("[]") and "--versus" in out.stdout


@needs_model
def test_the_report():
    out = run("--model", str(FOLDER), PROMPT)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith("TensorLens(stories260K, 14 tokens, 5 layers × 8 heads")
    for part in (
        PROMPT,
        "'Lily'",
        "By token",
        "By component (direct effect)",
        "L4MLP",
        "Sum by token",
    ):
        assert part in out.stdout
    assert "capture check" in lines[-1] and "completeness error" in lines[-1]


@needs_model
def test_json_from_standard_input_and_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["--model", str(FOLDER), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt"] == PROMPT and report["target"] == "'Lily'"
    for by in ("token", "component"):
        total = sum(row["value"] for row in report["rows"][by])
        assert abs(total - report["target_value"]) < 1e-4
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert main(["--model", str(FOLDER), "--json", "--by", "token", "--file", str(file)]) == 0
    again = json.loads(capsys.readouterr().out)["rows"]["token"]
    assert again == report["rows"]["token"]


@needs_model
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", " Mary", PROMPT], "' Mary' is 4 tokens"),
        ([" "], "The prompt is empty"),
        (["--file", "/no/such/file"], "--file /no/such/file cannot be read"),
        (["--file", "x", PROMPT], "A prompt and --file were both given"),
        (["--top", "0", PROMPT], "--top 0 is below 1"),
    ],
)
def test_user_errors_exit_2_with_a_message(args, message, capsys):
    assert main(["--model", str(FOLDER), *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("tensorlens-tl: ") and message in captured.err


@needs_model
def test_a_target_by_its_id(capsys):
    assert (
        main(["--model", str(FOLDER), "--json", "--by", "token", "--target", "#400", PROMPT]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    total = sum(row["value"] for row in report["rows"]["token"])
    assert abs(total - report["target_value"]) < 1e-4


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert main(["--model", str(tmp_path), PROMPT]) == 2
    assert "it has no config.json" in capsys.readouterr().err


def test_a_hub_name_that_cannot_be_reached(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main(["--model", "somebody/a-model", PROMPT]) == 2
    assert (
        "'somebody/a-model' is no folder here, and the model hub cannot" in capsys.readouterr().err
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_unknown_words_are_named():
    class Tokenizer:
        unk_token_id = 0

        def encode(self, word, add_special_tokens):
            return [0 if word == "zyzzy" else 1]

    assert unknown_words(Tokenizer(), "a zyzzy b zyzzy") == ["zyzzy"]
    Tokenizer.unk_token_id = None
    assert unknown_words(Tokenizer(), "a zyzzy") == []


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        out = subprocess.run(
            [sys.executable, "-m", "tensorlens_tl"],
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    assert out.returncode == 0 and "BrokenPipe" not in out.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shows_the_models_own_noise(dtype, capsys):
    assert main(["--dtype", dtype, "--json", "The capital of France is"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["completeness_error"] <= 2 * report["noise_floor"] < 0.1
    assert main(["--dtype", dtype, "The capital of France is"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"(model's own {dtype} noise {report['noise_floor']:.0e})" in lines[-1]
    assert report["exactness"] in lines[0]
    assert main(["--json", "The capital of France is"]) == 0
    assert json.loads(capsys.readouterr().out)["noise_floor"] is None


# --- evaluate ------------------------------------------------------------------------------------

PAIR = "The capital of France is\nThe capital of Peru is\n"


def test_evaluate_prints_the_table_and_nothing_else(tmp_path, capfd):
    file = tmp_path / "prompts.txt"
    file.write_text(PAIR)
    assert main(["evaluate", "--methods", "in_out", "rollout", "--file", str(file)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("Evaluation of 2 methods on 2 prompts of tensorlens_tl demo")
    assert lines[2].split("  ")[0] == "masked by delete" and lines[-1].startswith("rollout")


def test_evaluate_gives_json_for_pipelines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(PAIR))
    args = [
        "--protocol",
        "eraser",
        "leave_one_out",
        "--masking",
        "token",
        "mean",
        "--methods",
        "norm",
    ]
    assert main(["evaluate", *args, "--versus", "runner_up", "--keep-last", "--json"]) == 0
    found = Evaluation.from_json(capsys.readouterr().out)
    assert len(found) == 2 and found.versus == "runner_up" and found.keep_last
    assert {row.measure for row in found.rows} == {
        "comprehensiveness",
        "sufficiency",
        "leave_one_out",
    }
    assert {row.masking for row in found.rows} == {"token", "mean"}


def test_evaluate_draws_the_demo_s_own_prompts(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["evaluate", "--task", "facts", "--n", "3", "--methods", "random"]) == 0
    assert "of 1 method on 3 prompts" in capsys.readouterr().out
    given = ["The capital of France is", "The capital of Peru is"]
    assert main(["evaluate", *given, "--methods", "random"]) == 0
    assert "of 1 method on 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "roll"], "no method 'roll'. Choose one of norm, in, out"),
        (["--protocol", "perturb"], "protocol='perturb' does not exist. Use one of perturbation"),
        (["--masking", "blur"], "masking='blur' does not exist"),
        (["--preset", "atad"], "preset='atad' does not exist"),
        (["--target", "John"], "target='John' is predicted by no prompt"),
        (["--file", "/no/such/file"], "--file /no/such/file cannot be read"),
        (["--file", os.devnull], "There are no prompts. Pass them as arguments, or one per line"),
        (["a", "--file", os.devnull], "Prompts and --file were both given"),
        (["--n", "0", "--file", "-"], "--file - cannot be read"),
    ],
)
def test_evaluate_s_user_errors_exit_2_with_a_message(args, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(PAIR))
    assert main(["evaluate", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("tensorlens-tl: ") and message in captured.err


def test_evaluate_s_help_imports_no_host_and_not_even_torch():
    code = (
        "import sys; from tensorlens_tl.__main__ import main\n"
        "try: main(['evaluate', '--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformer_lens') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("[]") and "--protocol" in out.stdout
