"""sidestep's image with the grpc that the tests have: for pods that run grpc_echo.py."""

from pathlib import Path

import grpc

from tests.cluster import grpc_echo
from tests.cluster.bed import Bed
from tests.cluster.changed_image import add_layer
from tests.cluster.load.load import PYTHON
from tests.cluster.sidestep import IMAGE

GRPC = "localhost/sidestep:grpc"
ECHO = (PYTHON, "-c", Path(grpc_echo.__file__).read_text())  # and what it is to do
_SITE = "opt/venv/lib/python3.11/site-packages"  # of the Python in sidestep's image


def import_grpc_image(bed: Bed) -> None:
    """Every node has it afterwards."""
    library = Path(grpc.__file__).parent
    found = [path for path in library.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {f"{_SITE}/grpc/{path.relative_to(library)}": path.read_bytes() for path in found}
    archive = bed.cluster.directory / "grpc.tar"
    add_layer(IMAGE, archive, GRPC, files)
    bed.cluster.import_images([archive])
