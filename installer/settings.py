"""Defines every setting of the node's side once: flag, environment variable, default and meaning.

If Istio's install-cni has the setting too, it keeps Istio's name (`--cni-conf-name`, CNI_CONF_NAME). The environment
variables of sidestep's own settings begin with SIDESTEP_. The manifests' DaemonSet lists all settings.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bpf import trees
from bpf.bpffs import DEFAULT as DEFAULT_BPFFS
from bpf.kernel import ROOT, from_here, node_root
from bpf.layout import LEVELS, Level

if TYPE_CHECKING:
    from bpf.pins import Pins
    from cni.policy.annotations import OnUncaptured

# whether it can be read is found when it is: some commands give whom they can tell something, without it
_DIRECTORY = click.Path(path_type=Path, readable=False)
# sorts before the names that network providers choose (05-cilium, 10-calico, 10-flannel), and after 00-multus: multus
# must stay first, and calls the next file
_OWNED_FILE = "00-sidestep-cni.conflist"
# the run directory in the DaemonSet of this repository, and in Istio's (there it is a hostPath volume)
_RUN_DIR, _ISTIOS_RUN_DIR = Path("/run/sidestep"), Path("/var/run/istio-cni")


class _Port(click.ParamType[int]):
    """A port number; errors have the same words as those about annotations."""

    name = "port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert text to a port number; 0 is allowed."""
        if isinstance(value, int):
            return value
        if not (str(value).isdecimal() and int(value) <= 0xFFFF):
            self.fail(f'"{value}" is not a port; ports are 0–65535', param, ctx)
        return int(value)


PORT = _Port()

Group = TypeVar("Group")
Command = Callable[..., Any]


class _ListName(click.ParamType[str]):
    """The name, without a directory, of a .conflist file."""

    name = "filename"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "/" in value or value.startswith(".") or not value.endswith(".conflist"):
            self.fail(f'"{value}" is not the name of a .conflist file; give a name like {_OWNED_FILE}', param, ctx)
        return value


def _setting(
    default: Any,
    help: str,
    kind: Any = None,
    ours: bool = False,
    also: tuple[str, ...] = (),
    seen: Callable[[Path], Path] | None = None,
) -> Any:
    """Make a field of a settings group.

    `kind` is the click type, by default that of `default`. `ours` says that Istio's install-cni has no such setting.
    `also` are further environment variables for it. `seen` makes of the default what it is where this process runs.
    """
    if kind is None:
        kind = _DIRECTORY if isinstance(default, Path) else type(default)
    return field(default=default, metadata={"help": help, "kind": kind, "ours": ours, "also": also, "seen": seen})


def _run_dir_here(usual: Path) -> Path:
    return usual if node_root() == ROOT else _ISTIOS_RUN_DIR


def _listed(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(filter(None, (each.strip() for each in text.split(","))))


@dataclass(frozen=True)
class Attachment:
    """Where the programs are attached and pinned."""

    bpffs: Path = _setting(
        DEFAULT_BPFFS, "Mounted bpffs; pins live in its sidestep/ directory.", ours=True, seen=from_here
    )
    cgroup: Path | None = _setting(
        None,
        "cgroup2 directory to attach at, and nowhere else  [default: wherever pods are: kubelet's, else the root]",
        _DIRECTORY,
        ours=True,
    )

    @property
    def pins(self) -> "Pins":
        """The pins on the bpffs."""
        from bpf.pins import Pins  # imported here because it loads libbpf, which --help and completion do not need

        return Pins(self.bpffs)

    def choice(self) -> trees.Choice:
        """The cgroups to attach at: the settings', else where pods are now. Raises KernelRefused without cgroup2."""
        return trees.given(self.cgroup) if self.cgroup else trees.choose()

    def attach_point(self) -> Path:
        """The first of these cgroups. Raises KernelRefused if there is no cgroup2."""
        return self.choice().first


@dataclass(frozen=True)
class Logging:
    """What is logged, and how."""

    log_level: str = _setting(
        "info",
        "Log lines of this severity and above.",
        click.Choice(["debug", "info", "warn", "warning", "error"], case_sensitive=False),
    )
    log_as_json: bool = _setting(False, "One JSON object a line instead of key=value.")


@dataclass(frozen=True)
class Node:
    """Which node this is, and where its Pods come from."""

    cni_agent_run_dir: Path = _setting(
        _RUN_DIR,
        "Directory of the CNI socket; the plugin, which runs on the host, uses the same path.",
        seen=_run_dir_here,
    )
    agent_timeout_seconds: float = _setting(
        10.0,
        "Seconds that the plugin waits for an absent agent, and then for its answer, before it fails a mesh pod.",
        click.FloatRange(0, 600, min_open=True),
        ours=True,
    )
    pods: Path | None = _setting(
        None,
        "Directory of Pod manifests (.yaml, .yml, .json), for nodes without an API server.",
        click.Path(path_type=Path, exists=True, file_okay=False),
        ours=True,
    )
    kubernetes_node_name: str = _setting(
        "",
        "Name of this node in the API; the agent watches the node's pods.",
        also=("NODE_NAME",),  # of Istio's DaemonSet
    )
    kubeconfig: Path | None = _setting(
        None, "kubeconfig of the API server  [default: the pod's service account]", _DIRECTORY, ours=True
    )
    kube_ca_file: Path | None = _setting(None, "CA of the API server  [default: the service account's]", _DIRECTORY)
    skip_tls_verify: bool = _setting(False, "Do not verify the API server's certificate.")
    pod_namespace: str = _setting("istio-system", "Namespace of the agent's own DaemonSet.")
    daemonset: str = _setting("istio-cni-node", "Name of that DaemonSet.", ours=True)
    exclude_namespaces: tuple[str, ...] = _setting("", "Namespaces whose pods are left alone, separated by commas.")
    ambient_enabled: bool = _setting(
        False, "Capture pods in ambient mode too, for ztunnel: by labels of theirs or of their namespaces."
    )
    proc: Path = _setting(Path("/proc"), "procfs of the node; /host/proc in a container.", ours=True, seen=from_here)


@dataclass(frozen=True)
class Chain:
    """The plugin on the host: its file, and its place in the CNI configuration."""

    install: bool = _setting(False, "Copy the plugin to the host and keep it in the CNI chain.", ours=True)
    mounted_cni_bin_dir: Path = _setting(Path("/host/opt/cni/bin"), "The host's plugin directory.")
    mounted_cni_net_dir: Path = _setting(Path("/host/etc/cni/net.d"), "The host's CNI configuration directory.")
    cni_conf_name: str = _setting(
        "", "Configuration file to edit  [default: the first valid one; standalone: YYY-sidestep-cni.conf]"
    )
    chained_cni_plugin: bool = _setting(True, "Append to the CNI chain; if false, write a separate file, for multus.")
    istio_owned_cni_config: bool = _setting(
        False,
        "Do not edit the primary configuration; write a copy with the plugin added, under a name that sorts first.",
    )
    istio_owned_cni_config_filename: str = _setting(
        _OWNED_FILE,
        "File name of the copy that --istio-owned-cni-config writes.",
        _ListName(),
        # Istio's chart sets this variable, although install-cni reads the other
        also=("ISTIO_OWNED_CNI_CONF_FILENAME",),
    )
    cni_conf_group_read: bool = _setting(False, "Mode 0640 instead of 0600 for files that the agent creates.")
    shim: Path = _setting(Path("/opt/cni/bin/sidestep-cni"), "Path of the plugin in this image.", ours=True)


@dataclass(frozen=True)
class Repair:
    """What the agent does about broken pods: mesh pods that started without capture."""

    repair_enabled: bool = _setting(True, "Look for broken pods: mesh pods that started without capture.")
    repair_repair_pods: bool = _setting(
        True, "Enrol broken pods while they run; has priority over deleting and labelling."
    )
    repair_delete_pods: bool = _setting(False, "Delete broken pods; has priority over labelling.")
    repair_label_pods: bool = _setting(False, "Label broken pods.")
    repair_broken_pod_label_key: str = _setting("cni.istio.io/uninitialized", "Key of the label on broken pods.")
    repair_broken_pod_label_value: str = _setting("true", "Value of the label on broken pods.")
    repair_sidecar_annotation: str = _setting(
        "sidecar.istio.io/status", "Annotation without which a pod is not checked; empty: none."
    )
    repair_init_container_name: str = _setting(
        "istio-validation", "Init container whose failure shows that a pod is broken; empty: any."
    )
    repair_init_container_exit_code: int = _setting(126, "Exit code of that failure; 0: any.")
    repair_init_container_termination_message: str = _setting("", "Message of that failure; empty: any.")
    repair_label_selectors: str = _setting("", "Act only on pods that this label selector chooses.")
    repair_field_selectors: str = _setting("", "Act only on pods that this field selector chooses.")
    reconcile_seconds: float = _setting(
        180.0, "Seconds between comparisons of the maps with the pods.", click.FloatRange(1), ours=True
    )


@dataclass(frozen=True)
class Acceleration:
    """How far connections within the node skip TCP's path."""

    acceleration: str = _setting(
        str(Level.OFF),
        "Highest level on this node: off, proxy (between proxies) or full (also to applications that ask for it).",
        click.Choice(list(LEVELS)),
        ours=True,
    )

    @property
    def level(self) -> Level:
        """The level of the settings."""
        return LEVELS[self.acceleration]


@dataclass(frozen=True)
class Coverage:
    """What is done about what pods send past their proxies although no annotation asks for it."""

    uncaptured: "OnUncaptured" = _setting(
        "allow",
        "Of pods without the annotation sidestep.io/uncaptured: allow, audit (an Event for each kind) or deny.",
        click.Choice(["allow", "audit", "deny"]),
        ours=True,
    )
    uncaptured_exempt_namespaces: tuple[str, ...] = _setting(
        "", "Namespaces whose pods without the annotation are allowed all the same, separated by commas.", ours=True
    )
    uncaptured_events: bool = _setting(
        False, "An Event for the first of each kind, of pods that are allowed it too.", ours=True
    )


@dataclass(frozen=True)
class Following:
    """What running pods follow of their annotations, beside the ports that they deny."""

    live_policy: bool = _setting(
        False,
        "Running pods without the annotation sidestep.io/live-policy follow their annotations on ports and ranges.",
        ours=True,
    )


@dataclass(frozen=True)
class Ambient:
    """Ambient mode: which pods are in it, and how ztunnel gets them. Nothing of it counts unless it is enabled."""

    ambient_enablement_selector: str = _setting(
        "",
        "YAML list of {podSelector, namespaceSelector}; a pod that one of them chooses is in ambient mode  "
        "[default: the label istio.io/dataplane-mode=ambient of the pod or its namespace]",
    )
    ambient_dns_capture: bool = _setting(True, "Capture the DNS of pods without ambient.istio.io/dns-capture.")
    ambient_ipv6: bool = _setting(True, "Capture IPv6 of pods in ambient mode.")
    ztunnel_uds_address: Path = _setting(
        Path("/var/run/ztunnel/ztunnel.sock"), "Socket that ztunnel connects to; both mount its directory."
    )
    system_namespace: str = _setting("istio-system", "Namespace of ztunnel, which is never captured itself.")


@dataclass(frozen=True)
class Shadow:
    """Whether sidestep looks on at what Istio's rules do."""

    shadow: bool = _setting(
        False,
        "Decide for pods that Istio's rules capture, change nothing there, and compare with what netfilter does.",
        ours=True,
    )


@dataclass(frozen=True)
class Ports:
    """Where health and metrics are served."""

    monitoring_port: int = _setting(15014, "Port of /metrics for Prometheus.", PORT)
    health_port: int = _setting(8000, "Port of /healthz and /readyz.", PORT, ours=True)


def take(group: type[Group]) -> Callable[[Command], Command]:
    """Give a command an option for every setting of a group. The command gets the group as one argument of its name."""

    def decorate(command: Command) -> Command:
        names = [each.name for each in fields(group)]  # type: ignore[arg-type]

        def with_group(**options: Any) -> Any:
            chosen = {name: options.pop(name) for name in names}
            return command(**options, **{group.__name__.lower(): group(**chosen)})

        with_group.__name__, with_group.__doc__ = command.__name__, command.__doc__
        with_group.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for each in reversed(fields(group)):  # type: ignore[arg-type]
            with_group = _option(each)(with_group)
        return with_group

    return decorate


def take_one(group: type[Any], name: str) -> Callable[[Command], Command]:
    """Give a command an option for one setting of a group. The command gets it as an argument of the setting's name."""
    return _option(next(each for each in fields(group) if each.name == name))


def environment_variable(each: Any) -> str:
    """The name of the environment variable of a settings field."""
    name = each.name.upper()
    return f"SIDESTEP_{name}" if each.metadata["ours"] else name


def default_of(group: type[Any], name: str) -> Any:
    """The default of a setting where this process runs."""
    each = next(each for each in fields(group) if each.name == name)
    seen = each.metadata["seen"]
    return seen(each.default) if seen else each.default


class Setting(click.Option):
    """An option that is one of the agent's settings, to tell it from those of the command itself."""


def _option(each: Any) -> Callable[[Command], Command]:
    flag = f"--{each.name.replace('_', '-')}"
    kind, seen = each.metadata["kind"], each.metadata["seen"]
    listed = each.name.endswith("namespaces")
    return click.option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        each.name,
        cls=Setting,
        type=kind,
        default=seen(each.default) if seen else each.default,
        envvar=[environment_variable(each), *each.metadata["also"]],
        show_envvar=True,
        show_default=each.default not in (None, ""),
        callback=_listed if listed else None,
        help=each.metadata["help"],
    )
