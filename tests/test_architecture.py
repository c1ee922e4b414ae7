"""The floors are law: imports go down, hook names stay in the adapters, hosts are imported late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.algebra

PACKAGE = Path(__file__).resolve().parents[1] / "tensorlens_tl"
FLOORS = {
    "graph": 0, "heat": 0, "intervals": 0, "supported": 0, "frame": 0.3, "linear_map": 0.5, "weights": 0,
    "primitives": 1, "prompts": 1, "factored": 0,
    "sublayer": 2, "score_blocks": 0, "recomputed": 2,
    "sublayers": 3, "planning": 1, "rates": 0, "folding": 3, "contraction": 3.5, "singular": 3.7,
    "blocks": 4,
    "adapter": 2, "adapters": 3, "selfcheck": 3, "capturing": 4, "queries": 4,
    "score_weights": 4.5, "query_key": 5,
    "recording": 5, "precision": 5, "wiring": 0.5, "branches": 4, "restriction": 4.5, "composer": 5,
    "energies": 6,
    "targets": 6, "results": 5, "edges": 6, "attribution": 7, "paths": 7, "collapse": 7,
    "baselines_attention": 5, "baselines_vectors": 6, "baselines_gradient": 6, "baselines": 7,
    "selection": 1, "secant": 6.5, "differences": 8, "loadings": 8, "circuits": 8, "subgraphs": 8.5,
    "edge_universe": 4, "model_info": 5, "edge_runs": 6.5, "pairs": 6.5, "shares": 5,
    "interventions": 7.5, "baselines_edges": 7,
    "significance": 1, "protocols": 2, "methods": 8, "measured": 8, "masking": 8.5, "scoring": 8.7,
    "evaluation": 9, "headers": 9, "frozen_run": 9.5,
    "relation_data": 4, "relation_maps": 10, "holding": 7, "saving": 10, "plots": 10, "report": 10, "lens": 11,
    "datasets": 12, "statements": 12, "relations": 12, "validity": 12, "discovery": 13, "loading": 12,
    "plugin": 12, "families": 12,
    "support": 12, "demo": 12, "__main__": 13, "__init__": 13,
}  # fmt: skip
HOSTS = {"transformer_lens", "transformers"}
HOOK_NAMES = ("hook_", "blocks.{", ".hook")
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def floor(path: Path) -> int:
    return FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def test_every_file_has_a_floor():
    assert {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} <= set(FLOORS)


@every_file
def test_imports_go_down(path):
    tree = ast.parse(path.read_text())
    inside = path.relative_to(PACKAGE).parts[:-1]
    checked = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level <= len(inside):
                continue  # within a subpackage
            module = (node.module or "").split(".")[0]
            names = [module] if module else [alias.name for alias in node.names]
            for name in names:
                same = name == path.stem
                # paths within one floor may not import each other, except from the top
                assert floor(path) > FLOORS[name] or same or floor(path) >= 12, (
                    f"{path.name} → {name}"
                )
                checked += 1
    assert (
        checked
        or path.stem
        in (
            "graph",
            "factored",
            "linear_map",
            "rates",
            "score_blocks",
            "supported",
            "weights",
            "loading",
            "prompts",
            "shares",
            "families",
            "heat",
            "intervals",
            "__main__",
        )
        or inside
    )


@every_file
def test_no_module_level_import_of_a_host(path):
    tree = ast.parse(path.read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
    assert not names & HOSTS


@every_file
def test_hook_names_stay_in_the_adapters(path):
    if path.stem in ("adapter", "adapters", "graph") or "demo" in path.parts:
        # the one place, the site names, and the demo's own measurements
        assert floor(path) in (0, 2, 3, 12)
        return
    tree = ast.parse(path.read_text())
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        and n.body and isinstance(n.body[0], ast.Expr)
    }  # fmt: skip
    strings = [
        n.value for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]  # fmt: skip
    allowed = {"hook_resid_post"} if path.stem == "composer" else {"hook_dict"}
    found = [s for s in strings if any(h in s for h in HOOK_NAMES) and s not in allowed]
    assert not found


@every_file
def test_user_errors_are_never_asserts(path):
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]


@every_file
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500


def test_importing_the_package_imports_no_host_and_not_even_torch():
    code = (
        "import sys, tensorlens_tl; "
        "print([m for m in ('torch', 'transformer_lens', 'transformers', 'pandas', 'scipy') if m in sys.modules])"
    )  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_submodules_bear_none_of_them():
    import tensorlens_tl

    for name in tensorlens_tl.__all__:
        assert getattr(tensorlens_tl, name).__doc__, name
        assert not (PACKAGE / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tensorlens_tl.nothing
    assert set(tensorlens_tl.__all__) <= set(dir(tensorlens_tl))
