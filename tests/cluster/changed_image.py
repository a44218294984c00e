"""Another version of sidestep: its image, with a layer over it in which one text is another."""

import gzip
import hashlib
import io
import json
import tarfile
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
    """Write `target`: the image in `archive`, an OCI layout, with a change, under another name.

    It has only what is new, so it can be imported where `archive` has been imported.
    """
    with tarfile.open(archive) as layout:
        (described,) = _json(layout, "index.json")["manifests"]
        manifest = _json(layout, _blob(described["digest"]))
        config = _json(layout, _blob(manifest["config"]["digest"]))
    layer = _layer(change)
    packed = gzip.compress(layer, mtime=0)
    blobs = [packed]
    config["rootfs"]["diff_ids"].append(_digest(layer))
    config.setdefault("history", []).append({"created_by": f"changed {change.file}"})
    manifest["layers"].append({"mediaType": _LAYER, "digest": _digest(packed), "size": len(packed)})
    for key, document in (("config", config), ("", manifest)):
        content = json.dumps(document).encode()
        where = manifest[key] if key else described
        where |= {"digest": _digest(content), "size": len(content)}
        blobs.append(content)
    described["annotations"] = {"io.containerd.image.name": name}
    files = {_blob(_digest(blob)): blob for blob in blobs}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [described]}).encode()
    files["oci-layout"] = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
    with tarfile.open(target, "w") as layout:
        for path, content in files.items():
            _add(layout, path, content)


def _layer(change: Change) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        _add(layer, f"{_INSTALLED}/{change.file}", change.text().encode())
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
