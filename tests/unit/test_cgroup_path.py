"""The names that runtimes give to cgroups."""

from pathlib import Path

import pytest

from cni.cgroup_path import below_root
from cni.errors import InvalidRequest
from cni.protocol import RuntimeConfig

SLICES = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/kubepods/burstable/pod1-2", "kubepods/burstable/pod1-2"),  # containerd, driver cgroupfs
        (f"/{SLICES}", SLICES),  # containerd, driver systemd
        ("kubepods-burstable-pod1_2.slice", SLICES),  # CRI-O, driver systemd
        ("kubepods-burstable-pod1_2.slice:crio:abc", f"{SLICES}/crio-abc.scope"),  # as runc is told
        ("kubepods.slice::abc", "kubepods.slice/abc.scope"),
        ("a.slice:x:a-b.slice", "a.slice/a-b.slice"),
        ("-.slice", "."),
        ("-.slice:x:y", "x-y.scope"),
        ("/", "."),
        ("kubepods/pod1", "kubepods/pod1"),
        ("/kubepods", "kubepods"),
    ],
)
def test_what_runtimes_write(name: str, path: str) -> None:
    assert below_root(name) == Path(path)


@pytest.mark.parametrize(
    "name", ["/kubepods/../..", "..", "a:b", "a:b:c", "a.slice:b/c:d", "a/b.slice:c:d", "a\0b", ":::"]
)
def test_what_is_no_cgroup_is_refused_with_its_value(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"runtimeConfig.cgroupPath: .* is no cgroup; give a path"):
        RuntimeConfig.model_validate({"cgroupPath": name}).cgroup()


@pytest.mark.parametrize("said", [{}, {"cgroupPath": ""}, {"cgroupPath": None}])
def test_a_runtime_that_does_not_say(said: dict[str, object]) -> None:
    assert RuntimeConfig.model_validate(said).cgroup() is None
