"""What holds for all tests: no network, no traces in the user's cache, and no need of ALFWorld."""
import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # no test leaves games in the user's cache
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.pop("ALFWORLD_DATA", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of PyTorch: a busy core makes more threads very slow
sys.path.insert(0, str(Path(__file__).parent.parent))  # the six files are modules of the folder above

NO_ALFWORLD = "ALFWorld is not installed: pip install alfworld==0.4.2"


def pytest_collection_modifyitems(items):
    """Skip the tests that play ALFWorld if it is not installed. To find this out, do not import it."""
    if importlib.util.find_spec("alfworld"):
        return

    for item in items:
        # A test is ALFWorld's if it stands in test_alfworld.py, or if its parameter is "alfworld".
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else []
        plays_alfworld = "alfworld" in [str(value) for value in parameters]
        if plays_alfworld or item.path.name == "test_alfworld.py":
            item.add_marker(pytest.mark.skip(reason=NO_ALFWORLD))


def pytest_terminal_summary(terminalreporter):
    """Say in one line at the end how many tests were skipped without ALFWorld, also without -rs."""
    skipped = terminalreporter.stats.get("skipped", [])
    without_alfworld = [report for report in skipped if NO_ALFWORLD in str(report.longrepr)]
    if without_alfworld:
        terminalreporter.write_line(f"{len(without_alfworld)} skipped: {NO_ALFWORLD}")
