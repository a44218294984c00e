"""The other version of sidestep that the cluster suite upgrades to: the same image, with one text changed."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.changed_image import Change, change_image
from tests.cluster.scenarios.upgrade import CHANGE
from tests.lab.images import write_image

NAME = "localhost/sidestep:other"


def blob(layout: tarfile.TarFile, described: dict[str, Any]) -> bytes:
    algorithm, _, digest = described["digest"].partition(":")
    file = layout.extractfile(f"blobs/{algorithm}/{digest}")
    assert file is not None
    content = file.read()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (digest, described["size"])
    return content


def test_the_image_has_one_more_layer_with_the_changed_file_and_its_own_name(tmp_path: Path) -> None:
    change = Change("bpf/maps.h", "#define MAX_ADDRESSES 131072", "#define MAX_ADDRESSES 7")
    write_image(tmp_path / "before.tar", "localhost/sidestep:latest", {}, {"User": "0:0"})
    change_image(tmp_path / "before.tar", tmp_path / "after.tar", NAME, change)
    with tarfile.open(tmp_path / "after.tar") as layout:
        index = layout.extractfile("index.json")
        assert index is not None
        (described,) = json.load(index)["manifests"]
        assert described["annotations"] == {"io.containerd.image.name": NAME}
        manifest = json.loads(blob(layout, described))
        config = json.loads(blob(layout, manifest["config"]))
        packed = blob(layout, manifest["layers"][-1])
    layer = gzip.decompress(packed)
    assert config["rootfs"]["diff_ids"][-1] == f"sha256:{hashlib.sha256(layer).hexdigest()}"
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == 2
    with tarfile.open(fileobj=io.BytesIO(layer)) as files:
        (name,) = files.getnames()
        file = files.extractfile(name)
        assert file is not None
        assert (name, file.read().decode()) == ("opt/sidestep/bpf/maps.h", change.text())


def test_a_change_of_what_is_not_there_is_refused() -> None:
    assert CHANGE.text()
    with pytest.raises(LookupError, match=r"bpf/maps\.h has 'nothing like this' 0 times"):
        Change("bpf/maps.h", "nothing like this", "").text()
