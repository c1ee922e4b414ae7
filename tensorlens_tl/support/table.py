"""The support table: what works of every family, host class and host version.

``python -m tensorlens_tl.support`` measures the installed host:

1. Build a tiny random model of every family, for every class that transformer_lens offers.
2. Capture one run of each in float64. For a Bridge, also run the Hugging Face model inside, built
   again and never wrapped.
3. Print the larger of the completeness error and the Bridge's difference from Hugging Face, or the
   reason why there is none.

``--all`` tries every name that transformer_lens registers instead, and ``--only`` those that are
named: see :mod:`tensorlens_tl.support.every_name`. ``--json`` prints the same for machines;
``--all --json`` prints families and names. ``--merge`` makes the tables of docs/models.md from such
reports of several hosts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from ..plugin import capture
from ..refusals import UnsupportedArchitectureError
from .every_name import Name, registered, summary, try_all
from .name_tables import names_markdown
from .tiny_models import (
    D_VOCAB,
    FAMILIES,
    host_classes,
    hugging_face_logits,
    quiet,
    tolerance_of,
)

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
STATUSES = ("supported", "refused", "not offered", "not built", "wrong", "crashed")
"""Outcomes. "not offered": the host has no such model. "not built": the host fails to build or run
the model. "wrong" and "crashed": errors of this library."""

HUGGING_FACE_TOL = 2e-6
"""Largest difference of a Bridge from Hugging Face that counts as supported. Each of the two may
compute norms, softmax and rotations in float32, which alone costs up to 1e-6."""


@dataclass(frozen=True)
class Row:
    """The outcome of one family as one host class.

    Attributes:
        family: Name of the family, a key of :data:`FAMILIES`.
        host_class: Name of the class, a key of :func:`host_classes`.
        status: Outcome, one of :data:`STATUSES`.
        error: Largest |Δ logits| / |logits| of a capture, as ``TensorLens.verify`` gives. None if
            there was no capture.
        tolerance: Largest error that counts as supported. None if there was no capture.
        reason: Class of the error behind a refusal or failure, and the first sentence of its
            message.
        hugging_face: Largest |Δ logits| / |logits| between a Bridge and the Hugging Face model; the
            mean logit of each position is taken off, which compatibility mode moves. None if the
            model is no Bridge of such a model, or there was no capture.
    """

    family: str
    host_class: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    hugging_face: float | None = None

    def __str__(self) -> str:
        """Give the table's cell: the larger error, or the status."""
        if self.error is None:
            return "–" if self.status == "not offered" else self.status
        error = self.error if self.hugging_face is None else max(self.error, self.hugging_face)
        return f"{'' if self.status == 'supported' else 'wrong: '}{error:.0e}"


@dataclass(frozen=True)
class Report:
    """The whole table of one host.

    Attributes:
        versions: Versions of transformer_lens, transformers and torch, by name.
        rows: Outcome of every family as every class of the host.
        names: Outcome of every name that the host registers; none where it has no Bridge.
    """

    versions: dict[str, str]
    rows: tuple[Row, ...]
    names: tuple[Name, ...] = ()

    def to_json(self) -> str:
        """Write the report as JSON, one row per line."""
        rows, names = (
            ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in part)
            for part in (self.rows, self.names)
        )
        versions = json.dumps(self.versions)
        return f'{{"versions": {versions}, "rows": [\n{rows}\n], "names": [\n{names}\n]}}\n'

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`to_json` gave.

        Args:
            path: Path of the file.

        Returns:
            The report in the file.

        Raises:
            ValueError: If the file is not such a report.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            report = cls(
                dict(found["versions"]),
                tuple(Row(**row) for row in found["rows"]),
                tuple(Name(**name) for name in found.get("names", ())),
            )
            version = report.versions["transformer_lens"]
            if re.match(r"\d+\.\d+", version) and all(
                row.status in STATUSES for row in report.rows
            ):
                return report
        except (ValueError, LookupError, TypeError):
            pass
        raise ValueError(
            f"{path} is no support report. Make it again with "
            "`python -m tensorlens_tl.support --json`."
        )


def _reason(error: Exception) -> str:
    """The error's class and the first sentence of its message."""
    sentence = re.split(r"\.\s+(?=[A-Z])|;\s|\n", str(error).strip())[0]
    public = (
        UnsupportedArchitectureError if isinstance(error, UnsupportedArchitectureError) else None
    )
    return f"{(public or type(error)).__name__}: {sentence.rstrip('.')}"


def measure(family: str, host_class: str) -> Row:
    """Build a family as a host class, capture one run in float64, and give the outcome.

    Args:
        family: Name of the family, a key of :data:`FAMILIES`.
        host_class: Name of the class, a key of :func:`host_classes`.

    Returns:
        The outcome. No error of the host or the library is raised.
    """
    ids = torch.randint(
        0, D_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    with quiet(), torch.no_grad():
        try:
            model = host_classes()[host_class](family, torch.float64)
        except Exception as failure:
            return Row(family, host_class, "not built", reason=_reason(failure))
        if model is None:
            return Row(family, host_class, "not offered")
        try:
            logits, lens = capture(model, ids)
            error = lens.completeness_error
        except ValueError as refusal:
            return Row(family, host_class, "refused", reason=_reason(refusal))
        except Exception as crash:
            status = "crashed"
            try:
                model(ids)
            except Exception:  # the host cannot run it either
                status = "not built"
            return Row(family, host_class, status, reason=_reason(crash))
        theirs = against_hugging_face(family, host_class, ids, logits)
    tolerance = tolerance_of(family, host_class)
    same = theirs is None or theirs <= HUGGING_FACE_TOL
    status = "supported" if error <= tolerance and same else "wrong"  # NaN is wrong, too
    theirs = None if theirs is None else float(f"{theirs:.1e}")
    return Row(family, host_class, status, float(f"{error:.1e}"), tolerance, "", theirs)


def against_hugging_face(
    family: str, host_class: str, ids: torch.Tensor, logits: torch.Tensor
) -> float | None:
    """Compare a Bridge's logits with those of the Hugging Face model, built again.

    Args:
        family: Name of the family, a key of :data:`FAMILIES`.
        host_class: Name of the class, a key of :func:`host_classes`.
        ids: Token ids [batch, pos].
        logits: Logits of the host [batch, pos, d_vocab].

    Returns:
        The difference, as in :attr:`Row.hugging_face`; None for other classes of hosts.
    """
    if not host_class.startswith("Bridge"):
        return None
    theirs = hugging_face_logits(family, ids, torch.float64)
    ours, theirs = (t - t.mean(-1, keepdim=True) for t in (logits, theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def measure_all() -> Report:
    """Measure every family as every class of the installed host; names are left out."""
    rows = tuple(measure(family, cls) for cls in host_classes() for family in FAMILIES)
    return Report(versions(), rows)


def versions() -> dict[str, str]:
    """Versions of the host and of what it stands on, by name."""
    return {p: metadata.version(p) for p in ("transformer_lens", "transformers", "torch")}


SHORT = {
    "HookedTransformer": "Hooked",
    "Bridge": "Bridge",
    "Bridge, compatibility mode": "compat.",
    "boot_native": "native",
}
"""Short names of the host classes, for the heads of columns."""


@dataclass(frozen=True)
class _Table:
    """The rows of several hosts, by host class, version and family, and how they are shown."""

    rows: dict[tuple[str, str, str], Row]

    def columns(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """(host class, version) of every host that has one of these classes."""
        there = dict.fromkeys((host, version) for host, version, _ in self.rows)
        return [column for name in classes for column in there if column[0] == name]

    def offers(self, family: str, *classes: str) -> bool:
        """Whether a host has the family as one of these classes."""
        return any(row.status != "not offered" for row in self.of(family, classes).values())

    def supports(self, family: str) -> bool:
        """Whether any host class supports the family."""
        return any(row.status == "supported" for row in self.of(family, tuple(SHORT)).values())

    def of(self, family: str, classes: Sequence[str]) -> dict[tuple[str, str], Row]:
        """A family's rows, by column."""
        missing = Row(family, "", "not offered")
        return {c: self.rows.get((*c, family), missing) for c in self.columns(classes)}

    def table(self, families: Sequence[str], classes: Sequence[str]) -> str:
        """A Markdown table: a line per family, a column per host class and version."""
        heads = [_head(column) for column in self.columns(classes)]
        lines = [["family", *heads], ["---"] * (1 + len(heads))]
        lines += [[FAMILIES[f], *map(str, self.of(f, classes).values())] for f in families]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def reasons(self, families: Sequence[str]) -> str:
        """A list of why not: a line per family and reason, with the columns it stands for."""
        lines = []
        for family in families:
            found: dict[str, list[str]] = {}
            for column, row in self.of(family, tuple(SHORT)).items():
                if row.reason:
                    why = row.reason.removeprefix("UnsupportedArchitectureError: ")
                    found.setdefault(f"{row.status}: `{why}`", []).append(_head(column))
            for why, columns in found.items():
                lines.append(f"- **{FAMILIES[family]}** ({', '.join(columns)}) {why}\n")
        return "".join(lines)


def _head(column: tuple[str, str]) -> str:
    host_class, version = column
    return f"{SHORT[host_class]} {'.'.join(version.split('.')[:2])}"


def markdown(reports: Sequence[Report]) -> str:
    """The support tables of several hosts, in parts that are each narrow enough to be read.

    1. Families that a Bridge has, and the same as HookedTransformer.
    2. Families that ``boot_native`` or HookedTransformer alone has.
    3. Why not: a list for the cells of both tables, and one of what no class supports.
    4. Every name that a host registers (:mod:`tensorlens_tl.support.name_tables`).

    Args:
        reports: One report for each host version, in any order.

    Returns:
        Markdown of the tables, and of how they were made.

    Raises:
        ValueError: If two reports are of one host version.
    """
    by_version = {report.versions["transformer_lens"]: report for report in reports}
    if len(by_version) < len(reports):
        raise ValueError(
            f"{len(reports)} reports are of transformer_lens {', '.join(by_version)}. "
            "Pass one report for each version."
        )
    by_age = sorted(by_version, key=lambda v: [int(part) for part in re.findall(r"\d+", v)])
    rows = {
        (row.host_class, version, row.family): row
        for version in by_age
        for row in by_version[version].rows
    }
    table, (hooked, bridge, compat, native) = _Table(rows), SHORT
    works = [f for f in FAMILIES if table.supports(f)]
    bridges = [f for f in works if table.offers(f, bridge, compat)]
    others = [f for f in works if f not in bridges or table.offers(f, native)]
    refused = [f for f in FAMILIES if f not in works]
    made = "; ".join(
        ", ".join(f"{name} {v}" for name, v in by_version[version].versions.items())
        for version in by_age
    )
    return (
        "### Families of Hugging Face models\n\n"
        + table.table(bridges, (hooked, bridge, compat))
        + "\n### Made from a configuration\n\n"
        + table.table(others, (hooked, native))
        + "\n### Why not\n\n"
        + table.reasons(works)
        + "\n### Not supported by any class\n\n"
        + table.reasons(refused)
        + "\n"
        + names_markdown({v: found for v in by_age if (found := by_version[v].names)})
        + "\nMade by `python -m tensorlens_tl.support --all --json` under each host and `python -m "
        "tensorlens_tl.support --merge docs/support/*.json --into docs/models.md`: "
        f"{made}.\n"
    )


def write_into(page: Path, table: str) -> None:
    """Put the tables between the two comments of a Markdown page that mark their place.

    Args:
        page: Path of the page.
        table: Text that :func:`markdown` returned.

    Raises:
        ValueError: If the page has no such comments.
    """
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(
            f"{page} has no line {BEGIN} with a line {END} after it. Put both where the tables go."
        )
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name. None takes those of the process.

    Returns:
        0; 1 if a capture is wrong or crashes; 2 after a user error, reported on standard error.
    """
    p = argparse.ArgumentParser("python -m tensorlens_tl.support", description=__doc__)
    p.add_argument("--all", action="store_true", help="try every name that is registered")
    p.add_argument("--only", nargs="+", metavar="NAME", default=(), help="try these names")
    p.add_argument("--json", action="store_true", help="print a report, for --merge")
    p.add_argument("--merge", nargs="+", type=Path, metavar="REPORT", help="print their tables")
    p.add_argument("--into", type=Path, metavar="PAGE", help="write those tables into this page")
    args = p.parse_args(argv)
    if args.into and not args.merge:
        p.error("--into needs --merge and its reports")
    if unknown := sorted({*(args.only or ())} - {*registered()}):
        p.error(f"--only {unknown[0]}: transformer_lens registers no such name; --all lists them")
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
    names = try_all(args.only) if args.all or args.only else ()
    report = Report(versions(), ()) if args.only or (args.all and not args.json) else measure_all()
    report = replace(report, names=names)
    if args.json:
        sys.stdout.write(report.to_json())
    else:
        lines = [
            f"{FAMILIES[row.family]:24} {row.host_class:26} {row!s:12} {row.reason}"
            for row in report.rows
        ]
        lines += [f"{name.name:42} {name!s:10} {name.reason}" for name in names]
        lines += [summary(names)] if args.all else []
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in lines))
    outcomes = [row.status for row in report.rows] + [name.outcome for name in names]
    return int("wrong" in outcomes or "crashed" in outcomes)
