"""runc for a view of the machine in which cgroup2 has no controllers.

On a hybrid machine the controllers are in the v1 hierarchies, and a controller is in one hierarchy at a time. So a pure
cgroup2 has none to limit containers with, and runc refuses a container that is to be limited. Limits are not what these
tests are about: they are taken out of each container's specification.
"""

import shutil
import sys
from pathlib import Path

_RUNC = """#!{python} -ISB
import json, os, sys
if "--bundle" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    with open(path) as file:
        spec = json.load(file)
    spec["linux"].pop("resources", None)
    with open(path, "w") as file:
        json.dump(spec, file)
os.execv("{runc}", ["runc", *sys.argv[1:]])
"""


def find_runc() -> Path:
    """The distribution's."""
    return Path(shutil.which("runc") or "/usr/sbin/runc")


def write_runc_without_limits(path: Path, runc: Path) -> None:
    """A program that hands containers on to `runc`, without limits."""
    path.write_text(_RUNC.format(python=Path(sys.executable).resolve(), runc=runc))
    path.chmod(0o755)
