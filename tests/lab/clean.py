"""`python -m tests.lab.clean [ID …]`: take down the given labs, or all whose owner is gone."""

import os
import sys
from contextlib import suppress

from tests.lab.node import LABS, identity_of, remove


def abandoned() -> list[str]:
    """Labs that no living process has made, kept ones included."""
    found = []
    for directory in LABS.iterdir() if LABS.exists() else ():
        with suppress(FileNotFoundError, IndexError):  # not written yet
            owner = (directory / "owner").read_text()
            if owner == "kept" or owner != identity_of(int(owner.split()[0])):
                found.append(directory.name)
    return found


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("cleaning a lab needs root")
    for lab in sys.argv[1:] or abandoned():
        remove(lab)
        print(f"removed lab {lab}")
