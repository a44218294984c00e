"""`install-cni` understands what Istio's chart gives to istio-cni's, and says what it can't do."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bpf.errors import SidestepError
from installer.agent import agent
from installer.agent.agent import Settings
from installer.commands import install_cni as module
from installer.commands.cli import cli

# what Istio's chart of 1.32 sets (manifests/charts/istio-cni), with its default values
ISTIOS = {
    "CURRENT_AGENT_VERSION": "1.32.0",
    "AMBIENT_ENABLED": "false",
    "AMBIENT_ENABLEMENT_SELECTOR": "- podSelector: {}",
    "AMBIENT_DNS_CAPTURE": "true",
    "AMBIENT_IPV6": "true",
    "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP": "true",
    "ENABLE_AMBIENT_DETECTION_RETRY": "false",
    "ISTIO_OWNED_CNI_CONFIG": "false",
    "CHAINED_CNI_PLUGIN": "true",
    "EXCLUDE_NAMESPACES": "kube-system",
    "REPAIR_ENABLED": "true",
    "REPAIR_LABEL_PODS": "false",
    "REPAIR_DELETE_PODS": "false",
    "REPAIR_REPAIR_PODS": "true",
    "REPAIR_INIT_CONTAINER_NAME": "istio-validation",
    "REPAIR_BROKEN_POD_LABEL_KEY": "cni.istio.io/uninitialized",
    "REPAIR_BROKEN_POD_LABEL_VALUE": "true",
    "NATIVE_NFTABLES": "false",
    "REPAIR_NODE_NAME": "node-1",
    "REPAIR_RUN_AS_DAEMON": "true",
    "REPAIR_SIDECAR_ANNOTATION": "sidecar.istio.io/status",
    "ALLOW_SWITCH_TO_HOST_NS": "true",
    "NODE_NAME": "node-1",
    "GOMEMLIMIT": "8589934592",
    "GOMAXPROCS": "2",
    "POD_NAME": "istio-cni-node-abcde",
    "POD_NAMESPACE": "istio-system",
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the agent is started with, on a node that can be reached."""
    found: list[Settings] = []
    monkeypatch.setattr(agent, "run_agent", found.append)
    monkeypatch.setattr(module, "_require_node", lambda _: None)
    return found


def install_cni(*argv: str, **environment: str) -> Any:
    return CliRunner(env=ISTIOS | environment).invoke(cli, ["install-cni", *argv])


def test_istios_arguments_and_environment_make_an_agent(started: list[Settings]) -> None:
    done = install_cni("--log_output_level=info", "--log_as_json", CNI_CONF_NAME="10-a.conflist")
    assert done.exit_code == 0, done.output
    (settings,) = started
    assert settings.is_in_istios_daemonset
    assert (settings.node.kubernetes_node_name, settings.node.pod_namespace) == ("node-1", "istio-system")
    assert settings.node.exclude_namespaces == ("kube-system",)
    assert settings.chain.install
    assert (settings.chain.mounted_cni_bin_dir, settings.chain.cni_conf_name) == (
        Path("/host/opt/cni/bin"),
        "10-a.conflist",
    )
    assert settings.repair.repair_repair_pods
    assert (settings.ports.health_port, settings.ports.monitoring_port) == (8000, 15014)
    assert (settings.logging.log_level, settings.logging.log_as_json) == ("info", True)


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ("debug", "debug"),
        ("default:info", "info"),
        ("default:info,cni-agent:debug", "debug"),
        ("cni-agent:error,all:debug", "error"),
        ("all:warn", "warn"),
        ("default:none", "error"),
        ("validation:debug", "info"),
    ],
)
def test_istios_log_levels_are_understood_by_scope(started: list[Settings], given: str, level: str) -> None:
    assert install_cni(f"--log_output_level={given}").exit_code == 0
    assert started[0].logging.log_level == level


@pytest.mark.parametrize("given", ["loud", "default:", "default:info,cni:verbose", ""])
def test_a_level_that_is_none_is_named(started: list[Settings], given: str) -> None:
    done = install_cni(f"--log_output_level={given}")
    assert done.exit_code == 2
    assert "has no level; give one of debug, info, warn, error, fatal, none, or SCOPE:LEVEL" in done.output
    assert not started


def test_manifests_applied_over_istios_daemonset_leave_its_command_before_our_argument(
    started: list[Settings],
) -> None:
    assert install_cni("agent").exit_code == 0
    assert len(started) == 1
    assert install_cni("serve").exit_code == 2


def test_ambient_mode_is_refused_with_what_to_set(started: list[Settings]) -> None:
    done = install_cni(AMBIENT_ENABLED="true")
    assert isinstance(done.exception, SidestepError)
    assert "AMBIENT_ENABLED is true" in str(done.exception)
    assert "ambient.enabled=false" in str(done.exception)
    assert not started


def test_without_the_nodes_procfs_it_says_which_value_mounts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "has_mount", lambda *_: False)
    monkeypatch.setattr(module, "HOST_PROC", tmp_path / "proc")
    done = install_cni()
    assert isinstance(done.exception, SidestepError)
    assert "set repair.repairPods=true (with istioctl values.cni.repair.repairPods=true)" in str(done.exception)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    assert "add SYS_PTRACE" in str(install_cni().exception)
