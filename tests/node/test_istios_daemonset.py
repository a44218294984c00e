"""The agent works in Istio's own DaemonSet, with the mounts and rights that it has there."""

import json
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.agent.cni_host import LIST
from tests.lab.istios_daemonset import IstiosContainer, istios_container, started_pod
from tests.lab.node import REPOSITORY
from tests.lab.waiting import wait_until
from tests.node.test_left_out import running

SOON = 180  # on a machine on which much else is going on
NAME = "alpha"


@pytest.fixture(scope="module")
def agent() -> Iterator[IstiosContainer]:
    """One that is ready, on a node with a chain, beside a TPROXY pod that the plugin has added."""
    scratch = REPOSITORY / "build" / f"istios-{secrets.token_hex(3)}"  # /tmp in the container is its own
    (scratch / "pods").mkdir(parents=True)
    pod = running(NAME)
    pod["metadata"]["annotations"]["sidecar.istio.io/interceptionMode"] = "TPROXY"
    (scratch / "pods" / "pod.yaml").write_text(yaml.safe_dump(pod))
    try:
        with istios_container(scratch / secrets.token_hex(3), scratch / "pods") as made:
            made.host.run(["sh", "-c", "cat > /etc/cni/net.d/10-a.conflist"], json.dumps(LIST))
            made.start("--log_output_level=default:info,cni-agent:debug")
            try:
                wait_until(lambda: "event=plugin.installed file=10-a" in made.log(), "the agent", SOON)
            except TimeoutError as error:
                raise TimeoutError(f"{error}: {made.log()}") from None
            add(made)
            yield made
    finally:
        shutil.rmtree(scratch)


def add(agent: IstiosContainer) -> None:
    """What a runtime does."""
    netns = started_pod(agent.host, NAME, "10.9.9.9")
    entry = json.loads(agent.host.run(["cat", "/etc/cni/net.d/10-a.conflist"]))["plugins"][-1]
    previous = {"cniVersion": "1.0.0", "ips": [{"address": "10.9.9.9/24"}]}
    config = {**entry, "cniVersion": "1.0.0", "name": "net", "prevResult": previous}
    variables = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "abc",
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"K8S_POD_NAME={NAME};K8S_POD_NAMESPACE=default",
    }
    given = [f"{name}={value}" for name, value in variables.items()]
    agent.host.run(["env", *given, "/opt/cni/bin/sidestep-cni"], json.dumps(config))


def status(agent: IstiosContainer) -> Any:
    done = agent.sidestep("status", "--output", "json")
    assert done.returncode == 1, done.stderr or done.stdout  # as the pod has no proxy
    return json.loads(done.stdout)


def test_it_attaches_where_the_nodes_pods_are_and_says_so_by_the_nodes_paths(agent: IstiosContainer) -> None:
    told = status(agent)
    assert told["attached"]
    assert told["attach_point"] == "/sys/fs/cgroup/unified/kubepods"
    assert "sidestep" in agent.host.run(["ls", "/sys/fs/bpf"])


def test_the_plugin_finds_the_agent_in_istios_run_directory(agent: IstiosContainer) -> None:
    entry = json.loads(agent.host.run(["cat", "/etc/cni/net.d/10-a.conflist"]))["plugins"][-1]
    assert (entry["type"], entry["cni_agent_run_dir"]) == ("sidestep-cni", "/var/run/istio-cni")
    assert "pod=default/alpha container=abc" in agent.log()


def test_a_pods_settings_are_written_although_no_procfs_of_the_container_is_writable(agent: IstiosContainer) -> None:
    mark = agent.host.run(["nsenter", f"--net=/run/netns/{NAME}", "cat", "/proc/sys/net/ipv4/tcp_fwmark_accept"])
    assert mark == "1\n"


def test_addresses_are_followed_without_the_right_to_hear_all_namespaces(agent: IstiosContainer) -> None:
    assert 'event=watch.each reason="no CAP_NET_BROADCAST"' in agent.log()
    agent.host.run(["ip", "-n", NAME, "addr", "add", "10.9.9.10/24", "dev", "eth0"])

    def addresses() -> str:
        return agent.sidestep("maps", "addresses").stdout

    wait_until(lambda: "10.9.9.10" in addresses(), "the new address", SOON)


def test_processes_of_pods_are_seen_where_they_are(agent: IstiosContainer) -> None:
    (pod,) = status(agent)["pods"]
    assert pod["processes"]["strays"] == []
    assert pod["processes"]["unknown"] == ""
    assert pod["processes"]["captured"] >= 1


def test_what_is_missing_is_told_with_what_is_done_instead(agent: IstiosContainer) -> None:
    lacking = [line for line in agent.log().splitlines() if "event=node.lacks" in line]
    assert [name for line in lacking for name in ("NET_BROADCAST", "CHOWN", "process ids") if name in line] == [
        "NET_BROADCAST",
        "CHOWN",
        "process ids",
    ]
    probed = agent.sidestep("probe", "--output", "json")
    assert probed.returncode == 0, probed.stdout
    assert {row["verdict"] for row in json.loads(probed.stdout)["rows"]} == {"warning", "yes"}
