"""The house: imports go down and through doors, rooms stay small, hosts/ alone knows hosts.

Every rule is a function from a package folder to the faults it finds. It is asked about the package
as it is, where it must find none, and about copies with one fault each, where it must find that
one.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import tensorlens_tl

pytestmark = pytest.mark.algebra

PACKAGE = Path(__file__).resolve().parents[1] / "tensorlens_tl"
ROOMS = [
    "checks",
    "chunks",
    "refusals",
    "graph",
    "pictures",
    "maps",
    "costs",
    "sublayers",
    "operator",
    "readers",
    "hosts",
    "saving",
    "recording",
    "passes",
    "attribution",
    "features",
    "methods",
    "paths",
    "circuits",
    "evaluation",
    "editing",
    "exports",
    "replacement",
    "exhibits",
    "lens",
    "plugin",
    "relations",
    "distillation",
    "demo",
    "models",
    "support",
    "cli",
    "__main__",
]
"""From the ground up: a room imports only rooms before it."""
APART = [
    {"methods", "circuits"},
    {"paths", "circuits"},
    {"attribution", "passes"},
    {"circuits", "evaluation"},
    {"evaluation", "exports"},
]
"""Rooms beside each other: neither imports the other."""
FRONT = {"hosts", "readers", "refusals", "plugin", "demo", "support"}
"""Rooms that know host classes: hosts/ and two below, the plugin, and builders of models."""
SUBMODULES = {
    "distillation": {"OperatorLoss", "rows_of"},
    "editing": {
        "EditEvaluation",
        "EditRanking",
        "Predictions",
        "evaluate",
        "load_edit",
        "predict",
        "save_edit",
        "to_weights",
    },
    "evaluation": {"evaluate"},
    "features": {"error_shares", "load"},
    "exports": {"GraphLink", "GraphNode"},
    "lens": {"TensorLens", "load"},
    "methods": {"METHODS"},
    "relations": {"Relation", "decode", "state", "validity"},
}
"""Names that the docs import from a room, beside the flat ones."""
SITES = {"unembed.hook_in", "blocks.", ".hook_resid_", "hook_name", "hook_name_out"}
"""Residual sites, which users type, and keys of SAELens's configurations, which name such."""
HOST_NAMES = re.compile(r"hook_|blocks\.(?! )|\.hook")
HOST_CLASSES = re.compile(r"\w*(Bridge|HookedTransformer|Attention|ForCausalLM)(Config)?")
MOST_FILES, MOST_LINES = 12, 450


parsed = cache(ast.parse)  # a copy of the package has one file that is new
walked = cache(lambda tree: tuple(ast.walk(tree)))


def files(package: Path) -> dict[Path, ast.Module]:
    return {p: parsed(p.read_text()) for p in sorted(package.rglob("*.py"))}


def room_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return parts[0]


def cross_room_imports(path: Path, tree: ast.Module, package: Path):
    """(line, room, whether past its door, names) of every import from another room."""
    folder = path.relative_to(package).parts[:-1]
    for node in walked(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            parts = (*above, *(node.module or "").split(".")) if node.module else above
            names = [alias.name for alias in node.names]
            rooms = (
                [(*parts[:1], len(parts) > 1, names)] if parts else [(n, False, []) for n in names]
            )
            for there, inside, taken in rooms:
                if there != room_of(path, package):
                    yield node.lineno, there, inside, taken


# --- The four rules -------------------------------------------------------------------------------


def wrong_imports(package: Path) -> list[str]:
    """Imports of a room that is not below, and imports past a door."""
    faults = []
    for path, tree in files(package).items():
        here = room_of(path, package)
        for line, there, inside, _ in cross_room_imports(path, tree, package):
            where = f"{path.relative_to(package)}:{line}"
            if here != "__init__" and (
                there not in ROOMS[: ROOMS.index(here)] or {here, there} in APART
            ):
                faults.append(f"{where}: {there} is not below {here}")
            if inside and here != "__init__":
                faults.append(f"{where}: take {there}'s names from its door")
    return faults


def wrong_doors(package: Path) -> list[str]:
    """Doors that hand out more, or less, than others take; files that bear a handed-out name."""
    taken = defaultdict(set)
    for path, tree in files(package).items():
        for _, there, _, names in cross_room_imports(path, tree, package):
            taken[there] |= set(names)
    for name, there in tensorlens_tl._HOMES.items():
        taken[there].add(name)
    faults = []
    for door in sorted(package.glob("*/__init__.py")):
        room, tree = door.parent.name, ast.parse(door.read_text())
        if room in ("demo", "models", "support"):  # annexes, that no room stands on
            continue
        handed = {
            name
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
            for name in ast.literal_eval(node.value)
        }
        for name in sorted(handed ^ (taken[room] | SUBMODULES.get(room, set()))):
            faults.append(
                f"{room}: {name} is " + ("taken by no room" if name in handed else "missing")
            )
        faults += [
            f"{room}: a file is called {n}" for n in handed if (door.parent / f"{n}.py").exists()
        ]
        if "Key concepts:" not in (ast.get_docstring(tree) or ""):
            faults.append(f"{room}: the door does not say what the room is for")
    return faults


def too_large(package: Path) -> list[str]:
    faults = []
    for folder in sorted({path.parent for path in files(package)}):
        found = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        if len(found) > MOST_FILES:
            faults.append(f"{folder.name}: {len(found)} files")
        for path in folder.glob("*.py"):
            if (n := len(path.read_text().splitlines())) > MOST_LINES:
                faults.append(f"{path.relative_to(package)}: {n} lines")
    return faults


def host_names(package: Path) -> list[str]:
    """Hook names and host classes in strings outside hosts/; a message may speak of them."""
    faults = []
    for path, tree in files(package).items():
        if room_of(path, package) in FRONT:
            continue
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        docs = {
            id(node.body[0].value)
            for node in walked(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
        }
        docs |= {  # the names that a door hands out: classes of the library itself
            id(name)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for name in ast.walk(node.value)
        }
        for node in walked(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docs
            ):
                name = node.value
                if name not in SITES and (HOST_NAMES.search(name) or HOST_CLASSES.fullmatch(name)):
                    faults.append(f"{path.relative_to(package)}:{node.lineno}: {name!r}")
    return faults


RULES = [wrong_imports, wrong_doors, too_large, host_names]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert rule(PACKAGE) == []


BREAKS = {
    "upward": (wrong_imports, "graph/nodes.py", "from ..operator import Capture"),
    "sideways": (wrong_imports, "methods/tables.py", "from ..circuits import Circuit"),
    "top": (wrong_imports, "relations/relation.py", "from .. import support"),
    "past a door": (wrong_imports, "lens/frozen_run.py", "from ..operator.capture import Capture"),
    "late, inside a function": (
        wrong_imports,
        "graph/wiring.py",
        "def f():\n    from ..lens import load",
    ),
    "a taken name": (wrong_doors, "lens/frozen_run.py", "from ..operator import Folding"),
    "a door too wide": (wrong_doors, "graph/__init__.py", '__all__ = ["Edge", "nothing"]'),
    "a name and a file": (wrong_doors, "lens/load.py", ""),
    "no purpose": (wrong_doors, "newroom/__init__.py", ""),
    "a 13th file": (too_large, "operator/a13.py", ""),
    "451 lines": (too_large, "graph/nodes.py", "\n" * 451),
    "a hook name": (host_names, "lens/frozen_run.py", 'NAME = "attn.hook_z"'),
    "a host class": (host_names, "operator/capture.py", 'NAME = "BloomAttentionBridge"'),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_catches(name, tmp_path):
    rule, file, text = BREAKS[name]
    package = tmp_path / "tensorlens_tl"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "model"))
    (package / file).parent.mkdir(exist_ok=True)
    with open(package / file, "a") as opened:
        opened.write("\n" + text + "\n")
    for i in range(MOST_FILES) if "13th" in name else ():
        (package / "operator" / f"a{i}.py").touch()
    assert rule(package), name


def test_every_file_is_in_a_room():
    assert {room_of(p, PACKAGE) for p in files(PACKAGE)} <= {*ROOMS, "__init__"}


# --- What every file keeps ------------------------------------------------------------------------


def test_no_module_level_import_of_a_host_and_no_assert():
    faults = []
    for path, tree in files(PACKAGE).items():
        for node in tree.body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(m.split(".")[0] in ("transformer_lens", "transformers") for m in modules):
                faults.append((path.name, node.lineno))
        faults += [(path.name, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not faults


def test_importing_the_package_imports_no_host_and_not_even_torch():
    code = (
        "import sys, tensorlens_tl, tensorlens_tl.graph; modules = 'torch', 'transformer_lens', "
        "'transformers', 'pandas', 'scipy'; print([m for m in modules if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in tensorlens_tl.__all__:
        assert getattr(tensorlens_tl, name).__doc__, name
        assert not (PACKAGE / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tensorlens_tl.nothing


def test_tab_completion_shows_the_public_names_and_only_those(monkeypatch):
    pages = sorted((PACKAGE.parent / "docs" / "api").glob("*.rst"))
    text = "".join(page.read_text() for page in pages)
    documented = re.findall(r"^.. module:: tensorlens_tl\.(\w+)", text, re.MULTILINE)
    assert dir(tensorlens_tl) == sorted([*tensorlens_tl.__all__, *documented, "__version__"])
    for name in documented:  # as if nothing had imported the room yet
        monkeypatch.delattr(tensorlens_tl, name, raising=False)
        assert getattr(tensorlens_tl, name).__name__ == f"tensorlens_tl.{name}"
    names: dict = {}
    exec("from tensorlens_tl import *", names)
    assert sorted(names.keys() - {"__builtins__"}) == tensorlens_tl.__all__


def test_the_stub_names_what_is_loaded_late():
    """Type checkers and editors read the imports under TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (stub,) = (node for node in tree.body if isinstance(node, ast.If))
    stubbed = {
        alias.asname or alias.name: node.module for node in stub.body for alias in node.names
    }
    homes = tensorlens_tl._HOMES
    old = {name: homes[new] for name, new in tensorlens_tl._OLD_NAMES.items()}
    assert stubbed == homes | old | dict.fromkeys(tensorlens_tl._SUBMODULES)
