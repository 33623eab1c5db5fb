"""A pytest plugin (``-p tests.device_guard``) for runs on a GPU: one lost device must not fail every later test.

After an illegal access no further CUDA call of the process succeeds. The test that did it is reported; then the process
ends, and pytest-xdist starts a new worker for the others. What came of every test by then is kept in the JSON file that
TEST_RESULTS names, for the run itself may be ended at any time.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

counts, failures = Counter[str](), list[str]()


def pytest_configure(config):
    global is_worker
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist; its variables are there in a test's processes, too


def pytest_runtest_logreport(report):
    """Of a test that ran or could not; a worker's tests are reported to its controller, too."""
    if "TEST_RESULTS" not in os.environ or is_worker:
        return
    if report.when == "call" or report.outcome != "passed":
        failed = report.outcome == "failed"
        counts["error" if failed and report.when in ("setup", "teardown") else report.outcome] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = "" if crash is None else f": {crash.message.splitlines()[0]}"
        failures.extend([f"{report.nodeid}{reason}"] if failed else [])
        Path(os.environ["TEST_RESULTS"]).write_text(json.dumps({"counts": counts, "failures": failures}))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.excinfo is None or not torch.cuda.is_available() or not is_worker:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        print(f"{item.nodeid} lost the GPU:\n{outcome.get_result().longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
