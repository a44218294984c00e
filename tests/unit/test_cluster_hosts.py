"""What must hold of a cluster's hosts before any is booted: their addresses, and whom taking one down may kill."""

import subprocess
from ipaddress import ip_network
from itertools import combinations
from pathlib import Path

import pytest

from tests.cluster import shape
from tests.cluster.addresses import HOSTS, SERVICES, Place
from tests.cluster.host import Host
from tests.cluster.variables import UnknownValue


def test_a_process_that_has_the_number_of_a_dead_hosts_first_one_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "first").write_text(f"{other.pid} 1")
        Host("none", "node-1", Place(1), tmp_path).power_off()
        assert other.poll() is None
        other.kill()


def test_no_range_of_addresses_is_within_another() -> None:
    places = [Place(number) for number in (1, 2)]
    for family in (0, 1):
        labs = [ip_network("10.128.0.0/9")] if family == 0 else []
        ranges = [HOSTS[family], SERVICES[family], *labs, *(ip_network(each.pod_ranges[family]) for each in places)]
        assert not [pair for pair in combinations(ranges, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(
    ("driver", "qos", "cgroup"),
    [
        ("cgroupfs", "BestEffort", "/kubepods/besteffort/poda-b/c1"),
        ("cgroupfs", "Guaranteed", "/kubepods/poda-b/c1"),
        (
            "systemd",
            "Burstable",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice/cri-containerd-c1.scope",
        ),
        ("systemd", "Guaranteed", "/kubepods.slice/kubepods-poda_b.slice/cri-containerd-c1.scope"),
    ],
)
def test_a_container_is_where_its_driver_puts_it(
    driver: str, qos: str, cgroup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVER", driver)
    assert shape.cgroup_of("a-b", qos, "c1") == cgroup


def test_a_node_with_a_systemd_has_pure_cgroup2_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVER", "systemd")
    assert shape.cgroups() == shape.PURE
    monkeypatch.setenv("CGROUPS", "hybrid")
    with pytest.raises(UnknownValue, match=r"^CGROUPS=hybrid is none of pure$"):
        shape.cgroups()
