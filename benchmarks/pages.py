"""Sizes and speed of the pages: ``python benchmarks/pages.py``. Needs playwright and chromium.

1. Maps of 128, 512 and 2,048 tokens with heavy tails, each from four depths, are written.
2. Headless Chromium opens each from a file: time until the views are drawn, and of redraws.
3. A graph of 500 edges is panned, and its threshold moved, one frame at a time.
4. CircuitsVis and bertviz draw 4 heads of 512 tokens, where they are installed.
"""

import importlib.util
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tensorlens_tl.graph import Node
from tensorlens_tl.pictures import Page, depth, graph_view, map_view, panel

BARS = {"size": 2**20, "first paint": 1500.0, "redraw": 16.0}
"""Bytes, and milliseconds, at 2,048 tokens."""
FRAME = 33.4
"""Milliseconds of a frame while a graph of 500 edges moves: every second frame of 60 a second."""


def long_map(n: int, depths: int = 4) -> str:
    """A page of a triangle with heavy tails: one full map, and the largest cells elsewhere."""
    rng, found = np.random.default_rng(0), []
    for number in range(depths):
        cells = np.tril(rng.standard_t(1.5, (n, n)) * rng.random((n, 1))).astype(np.float32)
        constants = rng.standard_normal(n).astype(np.float32)
        form = None if number == 0 or n <= 128 else "largest"
        found.append((cells, depth(f"L{number}", cells, constants, form), constants))
    target = found[0][0].sum(1) + found[0][2]
    tokens = [f" token{i}" for i in range(n)]
    shown = panel("The operator", "logits", [one for _, one, _ in found], target)
    return Page("A long prompt", [map_view(tokens, tokens, [shown])]).html()


def large_graph(n: int = 40, edges: int = 500) -> str:
    """A page of random edges among tokens, heads and MLPs of six layers."""
    rng, nodes, at = random.Random(0), [], []
    for i in range(n):
        parts = [(f'"t{i}"@{i}', Node("embed"))]
        for layer in range(6):
            parts.append((f"L{layer}H{layer}@{i}", Node("head", layer, layer)))
            parts.append((f"L{layer}MLP@{i}", Node("mlp", layer)))
        nodes += [(*part, rng.gauss(0, 1)) for part in parts]
        at += [i] * len(parts)
    nodes.append(("target", Node("logits"), 3.0))
    at.append(n - 1)
    found = {}
    while len(found) < edges:
        a, b = sorted(rng.sample(range(len(nodes)), 2))
        if at[a] <= at[b]:
            reads = rng.choice(("v", "v", "q", "k")) if nodes[b][1].kind == "head" else ""
            found[a, b] = (a, b, reads, rng.gauss(0, 1))
    tokens = [f"t{i}" for i in range(n)]
    return Page("A large graph", [graph_view(nodes, found.values(), tokens, at)]).html()


def frames(browser, html: str, step: str) -> float:
    """Milliseconds of a frame in which something moves: the median of 60."""
    page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
    page.set_content(html)
    page.wait_for_selector("main[data-ready]")
    took = page.evaluate(f"""async () => {{
        const frame = () => new Promise(requestAnimationFrame), times = [];
        const box = document.querySelector('.graph .scroll');
        const input = document.querySelector('input[type=range]');
        for (let k = 0, last = await frame(); k < 60; k++) {{
            {step};
            const now = await frame();
            times.push(now - last);
            last = now;
        }}
        return times.sort((a, b) => a - b)[30];
    }}""")
    page.context.close()
    return took


PAN = "box.scrollLeft = (k * 37) % 900"
THRESHOLD = "input.value = k % (1 + +input.max); input.dispatchEvent(new Event('input'))"


def measured(browser, html: str, ready: str, redraw: str = "") -> tuple[float, float]:
    """Milliseconds until a page is drawn, and of one redraw (the median of 50)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_context(offline=True).new_page()
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector(ready, timeout=60_000)
        drawn = 1000 * (time.perf_counter() - start)
        # What a redraw costs is read off after a pixel of its canvas was, so that it is finished.
        script = f"""() => {{
            const times = [], view = tensorlens.views[0];
            const pen = view.figures[0].canvas.getContext('2d');
            for (let k = 0; k < 50; k++) {{
                view.state.row = k + 40; view.state.column = k;
                const start = performance.now();
                {redraw}; pen.getImageData(200, 200, 1, 1);
                times.push(performance.now() - start);
            }}
            return times.sort((a, b) => a - b)[25];
        }}"""
        took = page.evaluate(script) if redraw else float("nan")
        page.context.close()
    return drawn, took


def others(n: int) -> dict[str, str]:
    """Pages of CircuitsVis and bertviz for 4 heads of n tokens, where they are installed."""
    patterns = np.tril(np.random.default_rng(0).random((4, n, n)))
    patterns /= patterns.sum(-1, keepdims=True)
    tokens, found = [f"t{i}" for i in range(n)], {}
    if importlib.util.find_spec("circuitsvis"):
        from circuitsvis.attention import attention_heads

        found["CircuitsVis"] = attention_heads(patterns, tokens).local_src
    if importlib.util.find_spec("bertviz"):
        import torch
        from bertviz import head_view

        shown = head_view([torch.tensor(patterns)[None]], tokens, html_action="return")
        found["bertviz"] = shown.data if shown else ""
    return found


def main() -> int:
    from playwright.sync_api import Error, sync_playwright

    missed = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        # 1. and 2. Maps, drawn.
        for n in (128, 512, 2048):
            html = long_map(n)
            drawn, took = measured(browser, html, "main[data-ready]", "view.drawWindow()")
            size = f"{len(html) / 1000:7.0f} kB"
            print(f"{n:5} tokens: {size}, first paint {drawn:6.0f} ms, redraw {took:5.2f} ms")
            found = {"size": len(html), "first paint": drawn, "redraw": took}
            missed += [name for name, most in BARS.items() if n == 2048 and found[name] > most]
        # 3. A graph that moves.
        graph = large_graph()
        for name, step in (("pan", PAN), ("threshold", THRESHOLD)):
            took = frames(browser, graph, step)
            print(f"graph of 500 edges, {len(graph) / 1000:.0f} kB, {name}: {took:5.1f} ms a frame")
            missed += [name] if took > FRAME else []
        # 4. Other libraries.
        for name, html in others(512).items():
            size = f"{len(html) / 1000:7.0f} kB"
            try:
                drawn, _ = measured(browser, html, "canvas, svg *")
                print(f"  512 tokens, {name}: {size}, first paint {drawn:6.0f} ms")
            except Error:
                print(f"  512 tokens, {name}: {size}, offline nothing is drawn in 60 s")
        browser.close()
    print(f"bars at 2,048 tokens: {BARS}; of a frame: {FRAME} ms")
    print(f"missed: {', '.join(missed) or 'none'}")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
