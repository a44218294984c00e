"""`make faults`: puts the faults of docs/troubleshooting.md into a running node, and counts those that are named."""

import sys
from pathlib import Path

import pytest

from tests.node.test_faults import COUNT

_TESTS = Path(__file__).with_name("test_faults.py")


class _Counting:
    """Counts the tests of faults that have passed."""

    def __init__(self) -> None:
        self.named = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One test, or its setting up or taking down."""
        is_fault = "named_in_words" in report.nodeid
        self.named += is_fault and report.when == "call" and report.passed


if __name__ == "__main__":
    counting = _Counting()
    status = pytest.main(["-v", str(_TESTS)], plugins=[counting])
    print(f"faults: {counting.named} of {COUNT} named", flush=True)
    sys.exit(status)
