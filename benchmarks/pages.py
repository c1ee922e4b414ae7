"""Sizes and speed of pages: ``python benchmarks/pages.py``. Needs playwright, chromium and Linux.

1. Maps are written: of 128, 512 and 2,048 tokens with heavy tails, from four depths each; and
   of a run of 2,048 tokens, the whole page of ``lens.operator_maps()``, with rollout beside it.
2. Headless Chromium opens each from a file: until the views are drawn, and for redraws.
3. A graph of 500 edges is panned, and its threshold moved, one frame at a time.
4. CircuitsVis, bertviz and this package draw the same 4 heads of 512 tokens, where installed.
5. matplotlib writes a map of 512 × 512 as PDF. The scripts of the pages are weighed.

What is counted is the time that all threads of Chromium were on a processor, so that a machine
which does other things at the time changes little: one free core is at most so slow. Of several
tries the best counts. The numbers go to ``results/pages.json``, and from there to docs/pages.md;
``--page`` only writes the page anew.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tensorlens_tl.graph import Node
from tensorlens_tl.pictures import Page, cell_map, depth, graph_view, map_view, panel
from tensorlens_tl.pictures.packing import packed
from tensorlens_tl.pictures.page import ASSETS, _asset, _lines

RESULTS = Path(__file__).parent / "results" / "pages.json"
PAGE = Path(__file__).parents[1] / "docs" / "pages.md"
MOST = {"size": 2**20, "first": 1500.0, "redraw": 16.0, "frame": 33.4, "pdf": 2e5, "written": 2.0}
"""Bytes; milliseconds; milliseconds; milliseconds, every second frame of 60; bytes; seconds."""
TRIES, WAIT = 5, 60
"""Tries of a page, twice as many of frames; and seconds until a page counts as never drawn."""
HEADS = 4


# --- Pages


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


def run_map(n: int) -> str:
    """The page of a run: the operator's maps by depth beside rollout, of an untrained model."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    import tensorlens_tl

    cfg = HookedTransformerConfig(
        n_layers=4,
        d_model=32,
        n_heads=2,
        d_head=16,
        d_mlp=64,
        n_ctx=n,
        d_vocab=500,
        act_fn="gelu",
        seed=0,
    )
    torch.manual_seed(0)
    ids = torch.randint(500, (1, n))
    with torch.no_grad():
        _, lens = tensorlens_tl.capture(HookedTransformer(cfg).eval(), ids)
        return lens.operator_maps().to_html() or ""


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


def heads(n: int) -> dict[str, str]:
    """Pages of the same heads of n tokens, by this package and by the others installed."""
    patterns = np.tril(np.random.default_rng(0).random((HEADS, n, n)))
    patterns = (patterns / patterns.sum(-1, keepdims=True)).astype(np.float32)
    tokens, found = [f"t{i}" for i in range(n)], {}
    stops = [depth(f"L0H{i}", one) for i, one in enumerate(patterns)]
    shown = panel("Attention pattern", "share of the row", stops, signed=False)
    view = map_view(tokens, tokens, [shown], ("query position", "key position"), slider="Head")
    found["this package"] = Page("Heads", [view]).html()
    if importlib.util.find_spec("circuitsvis"):
        from circuitsvis.attention import attention_heads

        found[f"CircuitsVis {version('circuitsvis')}"] = attention_heads(patterns, tokens).local_src
    if importlib.util.find_spec("bertviz"):
        import torch
        from bertviz import head_view

        drawn = head_view([torch.tensor(patterns)[None]], tokens, html_action="return")
        found[f"bertviz {version('bertviz')}"] = drawn.data if drawn else ""
    return found


# --- Measures


def on_processor() -> float:
    """Milliseconds that the threads of all Chromium processes of this one were on a processor."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            parents[folder.name] = rest.split()[1]
            if "chrom" in name:
                parts = [
                    int(task.read_text().split()[0]) for task in folder.glob("task/*/schedstat")
                ]
                used[folder.name] = sum(parts) / 1e6
        except OSError:  # it has ended
            continue
    total = 0.0
    for pid, own in used.items():
        at = pid
        while at in parents and at != str(os.getpid()):
            at = parents[at]
        total += own if at == str(os.getpid()) else 0.0
    return total


def loaded(browser: Any, html: str, ready: str, redraw: str = "") -> dict[str, Any]:
    """Open a page from a file: processor and wall time until it is drawn, and of one redraw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_context(offline=True).new_page()
        page.goto("about:blank")
        time.sleep(0.3)
        before, start = on_processor(), time.perf_counter()
        try:
            page.goto(path.as_uri(), timeout=1000 * WAIT)
            page.wait_for_selector(ready, timeout=1000 * WAIT)
        except Exception:  # of playwright: it was not drawn in time
            used = on_processor() - before
            page.context.close()
            return {"first": None, "used": used}
        found = {"wall": 1000 * (time.perf_counter() - start), "first": on_processor() - before}
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
        if redraw:
            found["redraw"] = page.evaluate(script)
        page.context.close()
    return found


def best(tries: int, once: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The least of every number over several tries."""
    found = [once() for _ in range(tries)]
    return {name: min(one[name] for one in found) for name in found[0]}


FRAMES = 60
PAN = "box.scrollLeft = (k * 37) % 900"
THRESHOLD = "input.value = k % (1 + +input.max); input.dispatchEvent(new Event('input'))"


def frames(browser: Any, html: str, step: str) -> dict[str, float]:
    """Processor time of a frame in which something moves, and the wall time between two."""
    page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
    page.set_content(html)
    page.wait_for_selector("main[data-ready]")
    time.sleep(0.5)
    before = on_processor()
    took = page.evaluate(f"""async () => {{
        const frame = () => new Promise(requestAnimationFrame), times = [];
        const box = document.querySelector('.graph .scroll');
        const input = document.querySelector('input[type=range]');
        for (let k = 0, last = await frame(); k < {FRAMES}; k++) {{
            {step};
            const now = await frame();
            times.push(now - last);
            last = now;
        }}
        return times.sort((a, b) => a - b)[{FRAMES // 2}];
    }}""")
    used = (on_processor() - before) / FRAMES
    page.context.close()
    return {"frame": used, "wall": took}


def printed(n: int = 512) -> dict[str, float]:
    """A figure of a map of n × n as PDF: bytes, and seconds on a processor."""
    grid = np.tril(np.random.default_rng(0).standard_normal((n, n)))
    start, written = time.process_time(), io.BytesIO()
    names = [f"t{i}" for i in range(n)]
    cell_map(None, grid, names, names, unit="logits").figure.savefig(written, format="pdf")
    return {"pdf": len(written.getvalue()), "written": time.process_time() - start}


def scripts() -> dict[str, int]:
    """Bytes of the scripts of all views and of the style: as text, and as a page packs them."""
    kinds = sorted(path.stem for path in ASSETS.glob("*.js") if path.stem != "boot")
    text = "\n".join(map(_lines, kinds)).encode()
    style, boot = (len(part.encode()) for part in (_asset("view.css"), _lines("boot")))
    return {"text": len(text) + style + boot, "packed": len(packed(text)) + style + boot}


def measured() -> dict[str, Any]:
    """All numbers, printed while they come."""
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {"maps": {}, "graph": {}, "others": {}}

    def keep(part: str, name: str, one: dict[str, Any]) -> None:
        found[part][name] = one
        print(part, name, {key: x and round(x, 2) for key, x in one.items()}, flush=True)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        # 1. and 2. Maps, drawn.
        found["browser"] = browser.version
        asked = [(f"{n:,} tokens, heavy tails", long_map(n)) for n in (128, 512, 2048)]
        for name, html in [*asked, ("2,048 tokens of a run, with rollout", run_map(2048))]:
            once = best(TRIES, lambda html=html: loaded(
                browser, html, "main[data-ready]", "view.drawWindow()"
            ))  # fmt: skip
            keep("maps", name, {"size": len(html.encode()), **once})
        # 3. A graph that moves.
        graph = large_graph()
        found["graph_size"] = len(graph.encode())
        for name, step in (("pan", PAN), ("threshold", THRESHOLD)):
            keep("graph", name, best(2 * TRIES, lambda step=step: frames(browser, graph, step)))
        # 4. Other libraries.
        for name, html in heads(512).items():
            ready = "main[data-ready]" if name == "this package" else "canvas, svg *"
            keep("others", name, {"size": len(html.encode()), **loaded(browser, html, ready)})
        browser.close()
    # 5. A figure, and the scripts.
    printed()  # fonts are found at the first figure
    found["pdf"] = best(TRIES, printed)
    found["scripts"] = scripts()
    return found


# --- The page

TEXT = f"""\
<!-- Made by benchmarks/pages.py of results/pages.json; do not edit. -->
# Pages, measured

Headless Chromium {{browser}}, offline, from a file. *Processor time* is that of all its threads
together: one free core is at most so slow, whatever else the machine does. *Wall time* is what the
clock said on two cores that others used, too. The best of {TRIES} tries counts, of {2 * TRIES} for
frames.

## Maps

One full map, and the largest cells of each row from three other depths.

| page | size | drawn, processor time | drawn, wall time | a redraw of the window |
| --- | --- | --- | --- | --- |
{{maps}}

## A graph of 500 edges

{{graph_size}}. The threshold jumps between 5 and 500 edges in each frame.

| | a frame, processor time | between two frames |
| --- | --- | --- |
{{graph}}

## {HEADS} heads of 512 tokens

The same patterns, in the same browser.{{note}} bertviz's page asks a server for the scripts that
draw; offline there are none.

| | page | offline |
| --- | --- | --- |
{{others}}

## A figure

A map of 512 × 512 as PDF: {{pdf}} in {{written}} of processor time.

## Scripts

Scripts and style of all views are {{text}} of text, and {{packed}} as a page packs them. A page
holds those of its own views.

## Bars

At 2,048 tokens: 1 MiB; 1.5 s until drawn; 16 ms for a redraw. A frame of the graph: 33.4 ms. The
PDF: 200 kB and 2 s. {{bars}}

`python benchmarks/pages.py` measures it anew.
"""


def missed(r: dict[str, Any]) -> list[str]:
    """The bars that are not met."""
    long = [one for name, one in r["maps"].items() if name.startswith("2,048")]
    worst = {name: max(one[name] for one in long) for name in ("size", "first", "redraw")}
    worst["frame"] = max(one["frame"] for one in r["graph"].values())
    worst |= r["pdf"]
    return [name for name, most in MOST.items() if worst[name] > most]


def page(r: dict[str, Any]) -> str:
    """The text of docs/pages.md."""
    kB, ms = "{:,.0f} kB".format, "{:,.0f} ms".format
    maps = [
        f"| {name} | {kB(one['size'] / 1000)} | {ms(one['first'])} | {ms(one['wall'])} | "
        f"{one['redraw']:.1f} ms |"
        for name, one in r["maps"].items()
    ]
    graph = [
        f"| {name} | {one['frame']:.1f} ms | {one['wall']:.1f} ms |"
        for name, one in r["graph"].items()
    ]
    others = []
    for name, one in r["others"].items():
        drawn = f"drawn in {ms(one['first'])}" if one["first"] else (
            f"nothing is drawn in {WAIT} s, of which {one['used'] / 1000:.1f} s of processor time"
        )  # fmt: skip
        others.append(f"| {name} | {kB(one['size'] / 1000)} | {drawn} |")
    absent = [n for n in ("CircuitsVis", "bertviz") if not any(n in o for o in r["others"])]
    note = f" Not installed: {', '.join(absent)}." if absent else ""
    found = missed(r)
    bars = "All are met." if not found else f"Missed: {', '.join(found)}."
    rows = {"maps": "\n".join(maps), "graph": "\n".join(graph), "others": "\n".join(others)}
    return TEXT.format(
        **rows,
        note=note,
        bars=bars,
        browser=r["browser"],
        graph_size=kB(r["graph_size"] / 1000),
        pdf=kB(r["pdf"]["pdf"] / 1000),
        written=f"{r['pdf']['written']:.1f} s",
        text=kB(r["scripts"]["text"] / 1000),
        packed=kB(r["scripts"]["packed"] / 1000),
    )


def main() -> int:
    if "--page" not in sys.argv:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")
    r = json.loads(RESULTS.read_text())
    PAGE.write_text(page(r))
    print(page(r))
    return len(missed(r))


if __name__ == "__main__":
    sys.exit(main())
