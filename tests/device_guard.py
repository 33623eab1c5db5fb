"""A pytest plugin (``-p tests.device_guard``) for runs on a GPU: one lost device must not fail every later test.

After an illegal access no further CUDA call of the process succeeds. The test that did it is reported; then the process
ends, and pytest-xdist starts a new worker for the others.
"""

import os
import sys

import pytest
import torch


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.excinfo is None or not torch.cuda.is_available() or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        print(f"{item.nodeid} lost the GPU:\n{outcome.get_result().longreprtext}", file=sys.stderr, flush=True)
        os._exit(1)
