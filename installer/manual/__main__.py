"""python -m installer.manual man DIRECTORY | markdown FILE."""

import sys
import time
from os import environ
from pathlib import Path

from installer.manual.markdown import document
from installer.manual.page import pages
from installer.manual.roff import page_of


def _man(directory: Path) -> None:
    """sidestep.1 and a page for each command; dated by SOURCE_DATE_EPOCH, seconds, where a build is to be repeated."""
    date = time.strftime("%Y-%m-%d", time.gmtime(float(environ.get("SOURCE_DATE_EPOCH", time.time()))))
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.1"):
        stale.unlink()
    every = list(pages())
    for page in every:
        others = every[1:] if page is every[0] else every[:1]
        (directory / f"{page.name}.1").write_text(page_of(page, others, date))


if __name__ == "__main__":
    kind, place = sys.argv[1], Path(sys.argv[2])
    if kind == "man":
        _man(place)
    else:
        place.write_text(document())
