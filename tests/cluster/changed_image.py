"""sidestep's image with a layer over it: another version of sidestep, or more programs beside it."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.node import REPOSITORY

_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_INSTALLED = "opt/sidestep"  # where the image has what the repository has


@dataclass(frozen=True)
class Change:
    """In `file` of the repository, `before` becomes `after`."""

    file: str
    before: str
    after: str

    def text(self) -> str:
        """The whole file as it is then. Raises LookupError unless `before` is in it once."""
        text = (REPOSITORY / self.file).read_text()
        if text.count(self.before) != 1:
            raise LookupError(f"{self.file} has {self.before!r} {text.count(self.before)} times")
        return text.replace(self.before, self.after)


def change_image(archive: Path, target: Path, name: str, change: Change) -> None:
    """Write `target`: the image in `archive`, an OCI layout, in another version and under another name."""
    add_layer(archive, target, name, {f"{_INSTALLED}/{change.file}": change.text().encode()})


def add_layer(archive: Path, target: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Write `target`: the image in `archive`, an OCI layout, with files over it, by their places, and another name.

    It has only what is new, so it can be imported where `archive` has been imported.
    """
    with tarfile.open(archive) as layout:
        (described,) = _json(layout, "index.json")["manifests"]
        manifest = _json(layout, _blob(described["digest"]))
        config = _json(layout, _blob(manifest["config"]["digest"]))
    layer = _layer(files)
    packed = gzip.compress(layer, compresslevel=1, mtime=0)
    config["rootfs"]["diff_ids"].append(_digest(layer))
    config.setdefault("history", []).append({"created_by": f"files for {name}"})
    manifest["layers"].append({"mediaType": _LAYER, "digest": _digest(packed), "size": len(packed)})
    blobs = [packed, _described(config, manifest["config"])]
    blobs.append(_described(manifest, described))
    described["annotations"] = {"io.containerd.image.name": name}
    entries = {_blob(_digest(blob)): blob for blob in blobs}
    entries["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [described]}).encode()
    entries["oci-layout"] = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
    with tarfile.open(target, "w") as layout:
        for path, content in entries.items():
            _add(layout, path, content)


def _described(document: dict[str, Any], descriptor: dict[str, Any]) -> bytes:
    """The document as a blob, which `descriptor` describes from now on."""
    content = json.dumps(document).encode()
    descriptor |= {"digest": _digest(content), "size": len(content)}
    return content


def _layer(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for path, content in files.items():
            _add(layer, path, content)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, path: str, content: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _json(layout: tarfile.TarFile, path: str) -> dict[str, Any]:
    file = layout.extractfile(path)
    assert file is not None, path
    found: dict[str, Any] = json.load(file)
    return found


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
