"""The support table: family × host class × host version → completeness error, or the refusal.

``python -m tensorlens_tl.support`` builds a tiny random model of every family for every class that
the installed transformer_lens offers, captures one run of each in float64 and prints what came of
it; ``--json`` prints the same for machines, and ``--merge`` makes README's table of such reports.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..plugin import capture
from .tiny_models import D_VOCAB, FAMILIES, TOL, host_classes, norms_in_float32, quiet

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
STATUSES = ("supported", "refused", "not offered", "not built", "wrong", "crashed")
"""Not offered: the host has no such model; not built: it fails to build or run it. Wrong and crashed:
errors of this library."""


@dataclass(frozen=True)
class Row:
    """What came of one family as one host class.

    Attributes:
        family: A key of :data:`tensorlens_tl.support.tiny_models.FAMILIES`.
        host_class: A key of :func:`tensorlens_tl.support.tiny_models.host_classes`.
        status: One of :data:`STATUSES`.
        error: max |Δ logits| / max |logits| of a capture; see ``TensorLens.verify``.
        tolerance: What the error may be.
        reason: Of a refusal or failure: the error's class, and its message's first sentence.
    """

    family: str
    host_class: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """What stands in the table: the error, or the status."""
        if self.error is None:
            return "–" if self.status == "not offered" else self.status
        return f"{'' if self.status == 'supported' else 'wrong: '}{self.error:.0e}"


@dataclass(frozen=True)
class Report:
    """The whole table of one host.

    Attributes:
        versions: Of transformer_lens, transformers and torch.
        rows: Every family as every class of the host.
    """

    versions: dict[str, str]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """JSON, a row a line."""
        rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in self.rows)
        return f'{{"versions": {json.dumps(self.versions)}, "rows": [\n{rows}\n]}}\n'

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`to_json` gave.

        Args:
            path: The file.

        Returns:
            The report.

        Raises:
            ValueError: If it is no such file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            report = cls(dict(found["versions"]), tuple(Row(**row) for row in found["rows"]))
            version = report.versions["transformer_lens"]
            if re.match(r"\d+\.\d+", version) and all(
                row.status in STATUSES for row in report.rows
            ):
                return report
        except (ValueError, LookupError, TypeError):
            pass
        raise ValueError(
            f"{path} is no support report: expected what `python -m tensorlens_tl.support --json` "
            "prints; make it anew"
        )


def _told(error: Exception) -> str:
    sentence = re.split(r"\.\s+(?=[A-Z])|;\s|\n", str(error).strip())[0]
    return f"{type(error).__name__}: {sentence.rstrip('.')}"


def measure(family: str, host_class: str) -> Row:
    """Build a family as a host class, capture one run of it in float64, and say what came of it.

    Args:
        family: A key of :data:`tensorlens_tl.support.tiny_models.FAMILIES`.
        host_class: A key of :func:`tensorlens_tl.support.tiny_models.host_classes`.

    Returns:
        The row; no error of the host or the library escapes.
    """
    ids = torch.randint(
        0, D_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    with quiet(), torch.no_grad():
        try:
            model = host_classes()[host_class](family, torch.float64)
        except Exception as failure:
            return Row(family, host_class, "not built", reason=_told(failure))
        if model is None:
            return Row(family, host_class, "not offered")
        try:
            error = capture(model, ids)[1].completeness_error
        except ValueError as refusal:
            return Row(family, host_class, "refused", reason=_told(refusal))
        except Exception as crash:
            status = "crashed"
            try:
                model(ids)
            except Exception:  # the host cannot run it either
                status = "not built"
            return Row(family, host_class, status, reason=_told(crash))
    tolerance = TOL[torch.float64, norms_in_float32(family, host_class)]
    status = "supported" if error <= tolerance else "wrong"  # NaN is wrong, too
    return Row(family, host_class, status, float(f"{error:.1e}"), tolerance)


def measure_all() -> Report:
    """Every family as every class of the installed host."""
    versions = {p: metadata.version(p) for p in ("transformer_lens", "transformers", "torch")}
    rows = tuple(measure(family, cls) for cls in host_classes() for family in FAMILIES)
    return Report(versions, rows)


def markdown(reports: Sequence[Report]) -> str:
    """The support table of several hosts.

    Args:
        reports: One for each host version, in any order.

    Returns:
        A Markdown table, and how it was made.

    Raises:
        ValueError: If two reports are of one host version.
    """
    by_version = {report.versions["transformer_lens"]: report for report in reports}
    if len(by_version) < len(reports):
        raise ValueError(
            f"expected one report per host version, got {len(reports)} reports of "
            f"{', '.join(by_version)}: leave one out"
        )
    versions = sorted(by_version, key=lambda v: [int(part) for part in re.findall(r"\d+", v)])
    rows = {
        (row.host_class, version, row.family): row
        for version in versions
        for row in by_version[version].rows
    }
    classes = dict.fromkeys(host_class for host_class, _, _ in rows)
    columns = [
        (c, v) for c in classes for v in versions if any((c, v, f) in rows for f in FAMILIES)
    ]
    lines = [["family", *(f"{c} {v}" for c, v in columns), "why not"]]
    lines.append(["---"] * len(lines[0]))
    for family, label in FAMILIES.items():
        found = [rows.get((*column, family), Row(family, "", "not offered")) for column in columns]
        reasons = dict.fromkeys(row.reason for row in found if row.reason)
        why = "<br>".join(r.removeprefix("UnsupportedArchitectureError: ") for r in reasons)
        lines.append([label, *map(str, found), why])
    made = "; ".join(
        ", ".join(f"{name} {v}" for name, v in by_version[version].versions.items())
        for version in versions
    )
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        + "\nA number is max |Δ logits| / max |logits| of one capture of a tiny random model in float64 "
        "(the Bridge computes some norms in float32). Refused is by `UnsupportedArchitectureError` "
        "unless another is named; “–”: the host has no such model; not built: the host fails to "
        "build or run it. Made by `python -m tensorlens_tl.support --json` under each host and "
        f"`python -m tensorlens_tl.support --merge docs/support/*.json --into README.md`: {made}.\n"
    )


def write_into(page: Path, table: str) -> None:
    """Put a table between the two comments of a Markdown page that mark its place.

    Args:
        page: The file.
        table: What :func:`markdown` returns.

    Raises:
        ValueError: If the page has no such comments.
    """
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page}: expected a line {BEGIN} and after it a line {END}: put them in")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if a capture is wrong or crashes; 2 after a user error (told on standard error).
    """
    p = argparse.ArgumentParser("python -m tensorlens_tl.support", description=__doc__)
    p.add_argument("--json", action="store_true", help="print a report, for --merge")
    p.add_argument("--merge", nargs="+", type=Path, metavar="REPORT", help="print their table")
    p.add_argument("--into", type=Path, metavar="PAGE", help="write that table into this page")
    args = p.parse_args(argv)
    if args.into and not args.merge:
        p.error("--into needs --merge and its reports")
    if args.merge:
        try:
            table = markdown([Report.load(path) for path in args.merge])
            if args.into:
                write_into(args.into, table)
            else:
                sys.stdout.write(table)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"tensorlens_tl.support: {error}\n")
            return 2
        return 0
    report = measure_all()
    if args.json:
        sys.stdout.write(report.to_json())
    else:
        for row in report.rows:
            line = f"{FAMILIES[row.family]:24} {row.host_class:26} {row!s:12} {row.reason}"
            sys.stdout.write(f"{line.rstrip()}\n")
    return int(any(row.status in ("wrong", "crashed") for row in report.rows))
