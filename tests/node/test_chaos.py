"""A minute of `make chaos`: whatever is taken away, a connection in the clear is never unsaid."""

import re
import subprocess
import sys

from tests.lab.node import REPOSITORY


def test_no_connection_is_in_the_clear_without_a_word() -> None:
    argv = [sys.executable, "-m", "tests.chaos", "--seconds", "60", "--seed", "3"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    *unsaid, last = done.stdout.splitlines()[1:]
    assert (done.returncode, unsaid) == (0, []), done.stderr
    fates = r"(\d+) asked, (\d+) through the proxy, \d+ refused, \d+ in the clear and said so, 0 in the clear unsaid"
    found = re.fullmatch(f"chaos: {fates}", last)
    assert found and int(found[2]) > int(found[1]) / 10
