"""What every call of pytest in this repository needs, also for a single notebook (see pyproject.toml)."""

import os
import shutil
import tempfile

# Runs of tests and of notebooks under nbval go to a folder of their own, so that no old run is met.
RUNS = os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="workbook-runs-")


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval waits 5 s for each message, too short on a loaded machine
            item.output_timeout = 120


def pytest_unconfigure():
    shutil.rmtree(RUNS, ignore_errors=True)
