import os
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


def pytest_terminal_summary(terminalreporter):
    """Print what tests have counted by ``record_property("counts", ...)``."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "counts":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
