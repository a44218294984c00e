"""Images of the servers that Istio's tests have in pods, under the names that the tests give them."""

import re
from pathlib import Path
from typing import Any

from tests.cluster.builder import BIN
from tests.cluster.istio_images import HUB, TAG
from tests.lab.images import write_image

_CERTIFICATES = "tests/testdata/certs/dns"
_JWT_MANIFEST = "samples/jwt-server/jwt-server.yaml"


def make_test_images(directory: Path, source: Path) -> list[Path]:
    """All of them, into `directory`; `source` is the folder of Istio's module."""
    directory.mkdir()
    # as Istio's own images have it (pkg/test/echo/docker/Dockerfile.app and the Dockerfiles of the samples)
    app = {
        "usr/local/bin/server": BIN / "echo-server",
        "usr/local/bin/client": BIN / "echo-client",
        "cert.crt": source / _CERTIFICATES / "cert-chain.pem",
        "cert.key": source / _CERTIFICATES / "key.pem",
    }
    authz = {"usr/local/bin/extauthz": BIN / "ext-authz"}
    jwt = {"bin/jwt-server": BIN / "jwt-server"}
    made: list[Path] = []
    for name, files, settings in (
        (f"{HUB}/app:{TAG}", app, {"User": "1338", **_runs("/usr/local/bin/server")}),
        (f"{HUB}/ext-authz:{TAG}", authz, _runs("/usr/local/bin/extauthz")),
        (_image_in(source / _JWT_MANIFEST), jwt, _runs("/bin/jwt-server")),
    ):
        archive = directory / f"{len(made)}.tar"
        write_image(archive, name, files, settings)
        made.append(archive)
    return made


def _image_in(manifest: Path) -> str:
    """The only one that a manifest names."""
    (name,) = re.findall(r"image: (\S+)", manifest.read_text())
    return str(name)


def _runs(program: str) -> dict[str, Any]:
    return {"Entrypoint": [program], "Env": ["PATH=/usr/local/bin:/bin"]}
