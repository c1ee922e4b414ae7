import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(p) for p in HERE.iterdir() if p.is_dir())]

import torch  # noqa: E402  (after the environment)
from core import is_core  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the core; leave out tests of what the installed host lacks: ``offered(condition)``.

    Tests marked ``fuzz`` take minutes. They run only where the marker is asked for by its name.
    """
    fuzz = "fuzz" in (config.option.markexpr or "")
    absent = [
        item
        for item in items
        if not all(m.args[0] for m in item.iter_markers("offered"))
        or (not fuzz and item.get_closest_marker("fuzz"))
    ]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        file = item.path.stem.removeprefix("test_")
        if is_core(file, item.name, item.originalname, parameters):
            item.add_marker("core")


@pytest.fixture(scope="session")
def chromium():
    """One headless Chromium for all tests; skips them where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (path := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Open HTML as a file, offline; fail on a request, an error, or anything on the console.

    ``opened(html, **options)`` gives Playwright's page, once its views are drawn.
    """
    faults, contexts = [], []

    def request(sent):
        if not sent.url.startswith(("file:", "data:", "blob:", "about:")):
            faults.append(sent.url)

    def open_html(html, **options):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        contexts.append(chromium.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.on("request", request)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(path.as_uri())
        if "srcdoc" not in html:
            page.wait_for_selector("main[data-ready]")
        return page

    yield open_html
    for context in contexts:
        context.close()
    assert not faults


def pytest_terminal_summary(terminalreporter):
    """Print what tests have counted by ``record_property("counts", ...)``."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "counts":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
