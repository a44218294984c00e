"""Every setting has a flag and an environment variable, and the flag wins."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from installer.settings import (
    Acceleration,
    Ambient,
    Attachment,
    Chain,
    Following,
    Logging,
    Node,
    Ports,
    Repair,
    Shadow,
    environment_variable,
    take,
)

GROUPS = [Attachment, Node, Chain, Repair, Acceleration, Following, Ambient, Shadow, Ports, Logging]
EVERY = [(group, each) for group in GROUPS for each in fields(group)]

# what Istio's install-cni calls them (cni/pkg/cmd/root.go), of those that mean something here
INSTALL_CNI = {
    "CNI_CONF_NAME",
    "CHAINED_CNI_PLUGIN",
    "LOG_LEVEL",
    "MOUNTED_CNI_NET_DIR",
    "CNI_AGENT_RUN_DIR",
    "CNI_CONF_GROUP_READ",
    "ISTIO_OWNED_CNI_CONFIG",
    "ISTIO_OWNED_CNI_CONFIG_FILENAME",
    "KUBE_CA_FILE",
    "SKIP_TLS_VERIFY",
    "MONITORING_PORT",
    "EXCLUDE_NAMESPACES",
    "POD_NAMESPACE",
    "KUBERNETES_NODE_NAME",
    "REPAIR_ENABLED",
    "REPAIR_REPAIR_PODS",
    "REPAIR_DELETE_PODS",
    "REPAIR_LABEL_PODS",
    "REPAIR_BROKEN_POD_LABEL_KEY",
    "REPAIR_BROKEN_POD_LABEL_VALUE",
    "REPAIR_SIDECAR_ANNOTATION",
    "REPAIR_INIT_CONTAINER_NAME",
    "REPAIR_INIT_CONTAINER_EXIT_CODE",
    "REPAIR_INIT_CONTAINER_TERMINATION_MESSAGE",
    "REPAIR_LABEL_SELECTORS",
    "REPAIR_FIELD_SELECTORS",
    "AMBIENT_ENABLED",
    "AMBIENT_ENABLEMENT_SELECTOR",
    "AMBIENT_DNS_CAPTURE",
    "AMBIENT_IPV6",
    "ZTUNNEL_UDS_ADDRESS",
    "SYSTEM_NAMESPACE",
}


def chosen(group: type[Any], *argv: str, **environment: str) -> Any:
    """What a command gets that takes this group."""
    got: list[Any] = []

    @click.command()
    @take(group)
    def command(**groups: Any) -> None:
        got.extend(groups.values())

    done = CliRunner(env=environment).invoke(command, argv)
    assert done.exit_code == 0, done.output
    return got[0]


def test_settings_that_install_cni_has_are_called_as_there() -> None:
    assert {environment_variable(each) for _, each in EVERY} >= INSTALL_CNI


@pytest.mark.parametrize(("group", "each"), EVERY, ids=lambda value: getattr(value, "name", ""))
def test_a_setting_is_explained_with_its_environment_variable(group: type[Any], each: Any) -> None:
    command = take(group)(lambda **_: None)
    help_text = CliRunner().invoke(click.command()(command), ["--help"]).output
    assert f"--{each.name.replace('_', '-')}" in help_text
    assert environment_variable(each) in re.sub(r"\s+", "", help_text)


def test_the_flag_goes_before_the_environment_and_that_before_the_default() -> None:
    assert chosen(Chain).cni_conf_name == ""
    assert chosen(Chain, CNI_CONF_NAME="10-a.conflist").cni_conf_name == "10-a.conflist"
    assert chosen(Chain, "--cni-conf-name", "20-b.conf", CNI_CONF_NAME="10-a.conflist").cni_conf_name == "20-b.conf"


def test_what_install_cni_takes_as_a_boolean_is_one_here() -> None:
    assert chosen(Chain).chained_cni_plugin is True
    assert chosen(Chain, CHAINED_CNI_PLUGIN="false").chained_cni_plugin is False
    assert chosen(Repair, "--no-repair-enabled").repair_enabled is False


def test_the_name_that_istios_chart_sets_counts_too_but_after_the_one_that_install_cni_reads() -> None:
    assert chosen(Chain).istio_owned_cni_config_filename == "00-sidestep-cni.conflist"
    chart = {"ISTIO_OWNED_CNI_CONF_FILENAME": "02-chart.conflist", "ISTIO_OWNED_CNI_CONFIG_FILENAME": ""}
    assert chosen(Chain, **chart).istio_owned_cni_config_filename == "02-chart.conflist"
    both = chart | {"ISTIO_OWNED_CNI_CONFIG_FILENAME": "03-binary.conflist"}
    assert chosen(Chain, **both).istio_owned_cni_config_filename == "03-binary.conflist"


@pytest.mark.parametrize("name", ["00-own.conf", "../00-own.conflist", "/etc/00-own.conflist", ".conflist"])
def test_a_list_of_our_own_has_the_name_of_a_list(name: str) -> None:
    command = click.command()(take(Chain)(lambda **_: None))
    done = CliRunner().invoke(command, ["--istio-owned-cni-config-filename", name])
    assert done.exit_code == 2
    assert f'"{name}" is not the name of a .conflist file; give a name like 00-sidestep-cni.conflist' in done.output


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "x"])
def test_the_plugin_is_told_no_time_that_it_would_refuse(seconds: str) -> None:
    assert chosen(Node, SIDESTEP_AGENT_TIMEOUT_SECONDS="2.5").agent_timeout_seconds == 2.5
    done = CliRunner().invoke(click.command()(take(Node)(lambda **_: None)), ["--agent-timeout-seconds", seconds])
    assert done.exit_code == 2


def test_namespaces_are_listed_with_commas() -> None:
    assert chosen(Node, EXCLUDE_NAMESPACES="a, b,,c").exclude_namespaces == ("a", "b", "c")
    assert chosen(Node).exclude_namespaces == ()


def test_levels_are_read_as_install_cni_writes_them() -> None:
    assert chosen(Logging, LOG_LEVEL="WARNING").log_level == "warning"
    assert chosen(Logging, LOG_LEVEL="warn").log_level == "warn"


def test_paths_are_paths() -> None:
    assert chosen(Attachment, "--bpffs", "/x").bpffs == Path("/x")
    assert chosen(Attachment, "--bpffs", "/x").pins.top == Path("/x/sidestep")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--pods", "."], "ambient mode needs an API server"),
        (["--kubernetes-node-name", "a", "--shadow"], "shadow mode is for pods with sidecars"),
        (["--kubernetes-node-name", "n", "--ambient-enablement-selector", "- podSelectors: {}"], "no such field"),
        (["--kubernetes-node-name", "n", "--ambient-enablement-selector", "{}"], "not a list"),
    ],
)
def test_ambient_mode_that_cannot_be_as_asked_for_ends_the_agent_before_it_changes_anything(
    argv: list[str], words: str
) -> None:
    command = [sys.executable, "-m", "installer", "agent", "--ambient-enabled", *argv]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr
