"""`python -m tests.lab.clean [ID …]`: take down the given labs, or all whose owner is gone.

A lab that was kept goes with the checkout that has made it: another checkout's stay.
"""

import os
import sys
from contextlib import suppress

from tests.lab.node import KEPT, LABS, identity_of, remove


def abandoned() -> list[str]:
    """Labs that no living process has made, and those that this checkout has kept."""
    found = []
    for directory in LABS.iterdir() if LABS.exists() else ():
        with suppress(FileNotFoundError, IndexError):  # not written yet
            owner = (directory / "owner").read_text()
            is_kept = owner.startswith("kept")
            if owner == KEPT or not (is_kept or owner == identity_of(int(owner.split()[0]))):
                found.append(directory.name)
    return found


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("cleaning a lab needs root")
    for lab in sys.argv[1:] or abandoned():
        remove(lab)
        print(f"removed lab {lab}")
