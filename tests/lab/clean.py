"""`python -m tests.lab.clean [ID …]`: take down the given labs, or all whose owner is gone."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from tests.lab.node import LABS, remove


def abandoned() -> list[str]:
    """Labs that no living process has made, kept ones included."""
    found = []
    for directory in LABS.iterdir() if LABS.exists() else ():
        owner = 0
        with suppress(OSError, ValueError):
            owner = int((directory / "owner").read_text())
        if not (owner and Path(f"/proc/{owner}").exists()):
            found.append(directory.name)
    return found


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("cleaning a lab needs root")
    for lab in sys.argv[1:] or abandoned():
        remove(lab)
        print(f"removed lab {lab}")
