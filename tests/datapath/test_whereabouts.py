"""What an ADD makes of a cgroup that cgroup2 does not have, on a hybrid host whose kubelet may use version 1."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import trees
from bpf.attachment import attach_also, attach_programs
from bpf.covering import cover
from bpf.kernel import Mount, cgroup2_root, mounts
from cni.enrolment.whereabouts import Whereabouts
from cni.errors import NotCaptured
from cni.protocol import RuntimeConfig
from tests.datapath.wires import Kernel, fresh_kernel


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """Programs for these tests alone: they are attached at the root in the end."""
    with fresh_kernel() as made:
        yield made


@pytest.fixture
def version1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy of version 1, which has the directories that a test makes. This machine's own are left alone."""
    monkeypatch.setattr(trees, "mounts", lambda kind: [*mounts(kind), Mount(tmp_path, kind, 0)])
    return tmp_path


def test_a_pod_that_version_1_alone_has_is_captured_only_where_it_is_known_to_come(
    kernel: Kernel, version1: Path
) -> None:
    root = cgroup2_root()
    name = Path(kernel.cgroup.name) / "pod1"
    whereabouts = Whereabouts.at_start(kernel.pins, lambda cgroup: cover(kernel.pins, cgroup))

    def require() -> None:
        whereabouts.require("default/alpha", RuntimeConfig(cgroupPath=f"/{name}"))

    attach_programs(kernel.pins, kernel.cgroup)
    require()  # no hierarchy has it yet: it will be made here
    (version1 / name).mkdir(parents=True)
    with pytest.raises(NotCaptured) as refused:
        require()
    assert str(refused.value).startswith("default/alpha may run uncaptured: its cgroup is in cgroup v1 alone")
    assert f"({version1 / name})" in str(refused.value)
    assert str(refused.value).endswith(f"give --cgroup {root}")
    with subprocess.Popen(["sleep", "600"]) as process:  # of a runtime that puts processes into cgroup2 as well
        (kernel.cgroup / "cgroup.procs").write_text(str(process.pid))
        require()
        process.kill()
    (kernel.cgroup / "pod1").mkdir()
    require()
    (kernel.cgroup / "pod1").rmdir()
    attach_also(kernel.pins, root)
    require()  # wherever its processes are, it is below the root
    attach_programs(kernel.pins, kernel.cgroup)
