"""The support table: the kept reports are what this host gives, and docs/models.md shows them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import CASES, ROUNDING

from tensorlens_tl import UnsupportedArchitectureError
from tensorlens_tl.support import table as support
from tensorlens_tl.support import tiny_models as families
from tensorlens_tl.support.every_name import Name
from tensorlens_tl.support.name_tables import names_markdown
from tensorlens_tl.support.table import (
    BEGIN,
    END,
    SHORT,
    Report,
    Row,
    markdown,
    measure,
    measure_all,
)

ROOT = Path(__file__).resolve().parents[2]
KEPT = [Report.load(path) for path in sorted((ROOT / "docs" / "support").glob("*.json"))]
REMEDY = (
    "if this is meant: under each host `python -m tensorlens_tl.support --all --json > docs/"
    "support/VERSION.json`, then `python -m tensorlens_tl.support --merge docs/support/*.json "
    "--into docs/models.md`"
)
CLASSES = {
    "hooked": "HookedTransformer",
    "bridge": "Bridge",
    "native": "boot_native",
    "compat": "Bridge, compatibility mode",
}


@pytest.fixture(scope="module")
def measured():
    return measure_all()


def by_key(report):
    return {(row.host_class, row.family): row for row in report.rows}


def test_every_row_is_as_kept(measured):
    version = measured.versions["transformer_lens"]
    kept = {report.versions["transformer_lens"]: report for report in KEPT}
    assert version in kept, f"no report of transformer_lens {version} is kept: {REMEDY}"
    ours, theirs = by_key(measured), by_key(kept[version])
    assert list(ours) == list(theirs), REMEDY
    changed = {
        key: f"{theirs[key].status} {theirs[key].reason} → {row.status} {row.reason} {row.error}"
        for key, row in ours.items()
        if row.status != theirs[key].status
        or (row.status == "refused" and row.reason != theirs[key].reason)
    }
    assert not changed, REMEDY


def test_errors_within_tolerance(measured):
    for report in (measured, *KEPT):
        for row in report.rows:
            assert row.status not in ("wrong", "crashed"), row
            assert (row.status == "supported") == (row.error is not None), row
            assert bool(row.reason) == (row.status in ("refused", "not built")), row
            if row.error is not None:
                float32 = families.norms_in_float32(row.family, row.host_class)
                most = 1e-5 if row.family == "qwen3.5" else 1e-6 if float32 else ROUNDING
                assert row.error <= row.tolerance == most, row
            compared = row.error is not None and row.host_class.startswith("Bridge")
            assert (row.hugging_face is not None) == compared, row
            assert not compared or row.hugging_face <= 2e-6, row


def test_whatever_the_tests_cover_is_supported(measured):
    rows = by_key(measured)
    for name, case in CASES.items():
        host, family = name.split("-", 1)
        compat = family.endswith("-compat")
        family = family.removesuffix("-compat")
        if family not in families.FAMILIES:  # encoders, which are tried by name
            continue
        row = rows[CLASSES["compat" if compat else host], family]
        assert row.status == "supported", row
        assert row.tolerance == (1e-5 if family == "qwen3.5" else case.tol()), row


def test_every_host_is_kept_with_every_family():
    assert [report.versions["transformer_lens"] for report in KEPT] == ["2.18.0", "3.9.0", "4.3.0"]
    for report in KEPT:
        assert {row.family for row in report.rows} == set(families.FAMILIES)
        statuses = [row.status for row in report.rows]
        assert statuses.count("supported") >= 15 and statuses.count("refused") >= 3
    built = {
        *families.HOOKED,
        *families._OTHER_HOOKED,
        *families.BRIDGE,
        *families.MORE_BRIDGE,
        *families._OTHER_BRIDGE,
    }
    assert built == set(families.FAMILIES)


def test_the_page_shows_what_the_kept_reports_merge_to(tmp_path):
    text = (ROOT / "docs" / "models.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0] == f"\n\n{markdown(KEPT)}\n"
    assert markdown(KEPT[::-1]) == markdown(KEPT)
    page = tmp_path / "models.md"
    page.write_text(text.replace("| GPT-2 |", "| stale |"))
    files = map(str, (ROOT / "docs" / "support").glob("*.json"))
    assert support.main(["--merge", *files, "--into", str(page)]) == 0
    assert page.read_text() == text


def test_a_cell_for_every_row_that_a_host_has():
    first, second, *lists = markdown(KEPT).split("\n### ")[0:]
    shown = {}
    for part in (first, second):
        heads, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("|")
        ]
        assert heads[0] == "family" and all(len(line) == len(heads) for line in lines)
        for line in lines:
            shown |= {(line[0], head): cell for head, cell in zip(heads, line, strict=True)}
    why_not, no_class, *of_names = lists
    assert why_not.startswith("Why") and no_class.startswith("Not") and len(of_names) == 3
    for report in KEPT:
        version = ".".join(report.versions["transformer_lens"].split(".")[:2])
        for row in report.rows:
            label, head = families.FAMILIES[row.family], f"{SHORT[row.host_class]} {version}"
            if row.status == "supported":
                assert shown[label, head] == str(row), row
            elif row.status != "not offered":  # in a table or not, a list says why
                why = row.reason.removeprefix("UnsupportedArchitectureError: ")
                reasons = [
                    line for line in f"{why_not}\n{no_class}".splitlines() if f"**{label}**" in line
                ]
                assert any(head in line and why in line and row.status in line for line in reasons)
                assert shown.get((label, head), row.status) == row.status


# --- What becomes of a host or a library that fails -----------------------------------------------


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.fixture
def one_row(monkeypatch):
    """A table of one family as one class, whose builder and capture are given."""

    def make(build, capture=None, theirs=None):
        monkeypatch.setattr(support, "host_classes", lambda: {"Bridge": build})
        monkeypatch.setattr(support, "against_hugging_face", lambda *_: theirs)
        monkeypatch.setattr(support, "FAMILIES", {"gpt2": "GPT-2"})
        if capture is not None:
            monkeypatch.setattr(support, "capture", capture)
        return measure("gpt2", "Bridge")

    return make


def lens(error):
    return lambda *_: (None, SimpleNamespace(completeness_error=error))


REFUSED = UnsupportedArchitectureError("cannot freeze X exactly: v2.5 of it. Supported: Y")


@pytest.mark.parametrize(
    ("build", "capture", "status", "reason", "shown"),
    [
        (failing(KeyError("embed")), None, "not built", "KeyError: 'embed'", "not built"),
        (lambda *_: None, None, "not offered", "", "–"),
        (
            lambda *_: object,
            failing(REFUSED),
            "refused",
            "UnsupportedArchitectureError: cannot freeze X exactly: v2.5 of it",
            "refused",
        ),
        (
            lambda *_: len,
            failing(ValueError("one.\nmore")),
            "refused",
            "ValueError: one",
            "refused",
        ),
        (lambda *_: len, failing(TypeError("no")), "crashed", "TypeError: no", "crashed"),
        (
            lambda *_: failing(OSError()),
            failing(TypeError("no")),
            "not built",
            "TypeError: no",
            "not built",
        ),
        (lambda *_: len, lens(3e-16), "supported", "", "3e-16"),
        (lambda *_: len, lens(3e-3), "wrong", "", "wrong: 3e-03"),
        (lambda *_: len, lens(float("nan")), "wrong", "", "wrong: nan"),
    ],
)
def test_what_becomes_of_a_row(one_row, capsys, build, capture, status, reason, shown):
    row = one_row(build, capture)
    assert (row.status, row.reason, str(row)) == (status, reason, shown)
    for options in ([], ["--json"]):
        assert support.main(options) == (status in ("wrong", "crashed"))
        out = capsys.readouterr().out
        assert "Traceback" not in out and (shown in out or "--json" in options)
    versions = json.loads(out)["versions"]
    assert list(versions) == ["transformer_lens", "transformers", "torch"]


@pytest.mark.parametrize(
    ("theirs", "shown"), [(2e-7, "2e-07"), (1e-17, "3e-16"), (0.5, "wrong: 5e-01")]
)
def test_a_bridge_that_is_another_model_is_wrong(one_row, theirs, shown):
    """Whatever the capture says of itself, the larger error is shown and decides."""
    row = one_row(lambda *_: len, lens(3e-16), theirs)
    assert (row.status == "wrong", str(row)) == (theirs > 2e-6, shown)


def test_compatibility_mode_moves_all_logits_of_a_position(monkeypatch):
    theirs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(support, "hugging_face_logits", lambda *_: theirs)
    moved = theirs + torch.arange(3)[:, None]
    off = support.against_hugging_face("gpt2", "Bridge, compatibility mode", None, moved)
    assert off < 1e-15
    moved[0, 0, 0] += 1
    assert support.against_hugging_face("gpt2", "Bridge", None, moved) > 0.1
    assert support.against_hugging_face("gpt2", "HookedTransformer", None, moved) is None


def test_a_report_survives_its_file(tmp_path, measured):
    (tmp_path / "a.json").write_text(measured.to_json())
    assert Report.load(tmp_path / "a.json") == measured


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"versions": {"transformer_lens": "x"}, "rows": []}',
        '{"versions": {"transformer_lens": "3.9.0"}, "rows": [{"family": "gpt2"}]}',
        Report({"transformer_lens": "3.9.0"}, (Row("gpt2", "Bridge", "fine"),)).to_json(),
    ],
)
def test_foreign_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert support.main(["--merge", str(tmp_path / "a.json")]) == 2
    assert "is no support report. Make it again" in capsys.readouterr().err


def test_other_user_errors(tmp_path, capsys):
    kept = str(next((ROOT / "docs" / "support").glob("*.json")))
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    for options, match in [
        (["--merge", kept, kept], "2 reports are of transformer_lens"),
        (["--merge", str(tmp_path / "none.json")], "No such file"),
        (["--merge", kept, "--into", str(page)], f"has no line {BEGIN} with a line"),
    ]:
        assert support.main(options) == 2
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit):
        support.main(["--into", str(page)])
    assert page.read_text() == f"{END}\n{BEGIN}\n"


def test_names_are_shown_with_what_is_in_their_way():
    exact = Name(
        "AForCausalLM", "exact", {"logits": 2e-16}, answers={"edges": "", "secant": "L3 is"}
    )
    blocked = "Cannot freeze {} exactly: it has a state space in block 0: {}"
    names = [exact] + [Name(n, "refused", reason=blocked.format(n, f"{n}Mixer")) for n in "BC"]
    names.append(Name("D", "not built", reason="transformers 5 has no class D"))
    older = (replace(exact, outcome="refused", errors={}), *names[1:3])
    table, others, unanswered = names_markdown({"3.9.0": older, "4.3.0": tuple(names)}).split(
        "\n### "
    )
    assert "transformer_lens 4.3.0 registers 4 names. 3 can be built here, and 1 of" in table
    assert "Circuits are served in 1 of them: 1 families" in table
    assert "| AForCausalLM | refused | 2e-16 | yes | yes | no |" in table
    assert "- it has a state space: B (BMixer), C (CMixer).\n" in others
    assert "- transformers 5 has no class this name: D.\n" in others
    assert "- **secant**: `a block is`: AForCausalLM.\n" in unanswered


def test_a_changed_status_shows():
    """The comparison with the kept report can fail."""
    kept = KEPT[0]
    changed = replace(kept, rows=(replace(kept.rows[0], status="refused"), *kept.rows[1:]))
    with pytest.raises(AssertionError):
        test_every_row_is_as_kept(changed)
    wrong = replace(kept, rows=(replace(kept.rows[0], error=1e-3), *kept.rows[1:]))
    with pytest.raises(AssertionError):
        test_errors_within_tolerance(wrong)
