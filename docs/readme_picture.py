"""Draws README's picture from the bundled model: ``python docs/readme_picture.py readme.png``.

1. Capture README's prompt.
2. Draw the tokens' shares, the heads' shares and the logit's way through depth, side by side.
"""

from __future__ import annotations

import sys

from matplotlib.figure import Figure

from tensorlens_tl import demo

PROMPT = "When Mary and John went to the store, John gave a drink to"


def main(path: str) -> None:
    """Write the picture to a file."""
    # 1. The run.
    _, lens = demo.load_model().run_with_tensorlens(PROMPT)
    # 2. Three pictures of it.
    figure = Figure(figsize=(14, 4), layout="constrained")
    tokens, heads, depth = figure.subplots(1, 3, width_ratios=(1.1, 1.0, 1.2))
    lens.attribute("Mary", versus="John").plot(tokens, kind="bars", top=8)
    lens.attribute("Mary", versus="John", by="head").plot(heads, kind="heads")
    lens.attribute("Mary", versus="John", by="component").plot(depth, kind="waterfall")
    titles = {tokens: "by token", heads: "by head", depth: "through depth"}
    for axes, title in titles.items():
        axes.set_title(f"'Mary' − 'John', {title}")
    tokens.set_xlabel("logits (the eight largest)")
    heads.set_xlabel("")
    depth.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
