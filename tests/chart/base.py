"""`python -m tests.chart.base` writes manifests/base/sidestep.yaml: the chart as it is rendered without any values.

The file is kept, so that nobody who uses kustomize needs Helm. Its head has a digest of the chart and of the rest of
the file. So tests see without Helm whether one of the two was changed without the other.
"""

import hashlib
import re

from tests.chart.helm import CHART, template_text
from tests.lab.node import REPOSITORY

BASE = REPOSITORY / "manifests" / "base" / "sidestep.yaml"
_HEAD = (
    "# Rendered by `make chart` from manifests/charts/sidestep: change it there.\n# sha256 of the chart and of this: "
)


def rendered() -> str:
    """The whole file, as it should be."""
    text = re.sub(r"^# Source: .*\n", "", template_text(), flags=re.M)
    return f"{_HEAD}{digest(text)}\n{text}"


def digest(text: str) -> str:
    """Of the chart's files, by name and content, and of what they are rendered to."""
    made = hashlib.sha256()
    for path in sorted(each for each in CHART.rglob("*") if each.is_file()):
        for part in (str(path.relative_to(CHART)).encode(), path.read_bytes()):
            made.update(hashlib.sha256(part).digest())
    made.update(text.encode())
    return made.hexdigest()


def is_current(content: str) -> bool:
    """Whether a file with this content was rendered from the chart as it is now, and not changed since."""
    head, _, text = content.removeprefix(_HEAD).partition("\n")
    return content.startswith(_HEAD) and head == digest(text)


if __name__ == "__main__":
    BASE.write_text(rendered())
