"""Every setting of the node's side once: its flag, its environment variable, its default, what it means.

A setting that Istio's install-cni has too keeps the name it has there (`--cni-conf-name`, CNI_CONF_NAME); ours are
called SIDESTEP_… in the environment. The manifests' ConfigMap lists them all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bpf.kernel import attach_point
from bpf.layout import LEVELS, Level

if TYPE_CHECKING:
    from bpf.pins import Pins

_DIRECTORY = click.Path(path_type=Path)
# comes before the names that network providers choose (05-cilium, 10-calico, 10-flannel), and after multus' 00-multus,
# which has to stay the first and calls the next one
_OWNED_FILE = "00-sidestep-cni.conflist"


class _Port(click.ParamType[int]):
    """A port number, told as the annotations' are."""

    name = "port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Of a port; 0 is one."""
        if isinstance(value, int):
            return value
        if not (str(value).isdecimal() and int(value) <= 0xFFFF):
            self.fail(f'"{value}" is not a port; ports are 0–65535', param, ctx)
        return int(value)


PORT = _Port()

Group = TypeVar("Group")
Command = Callable[..., Any]


class _ListName(click.ParamType[str]):
    """The name, without a directory, of a file that a runtime reads as a list of plugins."""

    name = "filename"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "/" in value or value.startswith(".") or not value.endswith(".conflist"):
            self.fail(f'"{value}" is no name of a list of plugins; give one like {_OWNED_FILE}', param, ctx)
        return value


def _setting(default: Any, help: str, kind: Any = None, ours: bool = False, also: tuple[str, ...] = ()) -> Any:
    """A field of a group; `ours` says that install-cni has no such setting, `also` are further variables for it."""
    if kind is None:
        kind = _DIRECTORY if isinstance(default, Path) else type(default)
    return field(default=default, metadata={"help": help, "kind": kind, "ours": ours, "also": also})


def _listed(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(filter(None, (each.strip() for each in text.split(","))))


@dataclass(frozen=True)
class Attachment:
    """Where the programs are attached and pinned."""

    bpffs: Path = _setting(Path("/sys/fs/bpf"), "Mounted bpffs; pins live in its sidestep/ directory.", ours=True)
    cgroup: Path | None = _setting(
        None, "cgroup2 directory to attach at  [default: kubelet's, else the cgroup2 root]", _DIRECTORY, ours=True
    )

    @property
    def pins(self) -> "Pins":
        """The pins on the chosen bpffs."""
        from bpf.pins import Pins  # which loads libbpf: --help and completion do without

        return Pins(self.bpffs)

    def attach_point(self) -> Path:
        """The chosen or the discovered cgroup. Raises KernelRefused when there is no cgroup2."""
        return self.cgroup or attach_point()


@dataclass(frozen=True)
class Logging:
    """What is logged, and how."""

    log_level: str = _setting(
        "info",
        "Least severe lines to log.",
        click.Choice(["debug", "info", "warn", "warning", "error"], case_sensitive=False),
    )
    log_as_json: bool = _setting(False, "One JSON object a line instead of key=value.")


@dataclass(frozen=True)
class Node:
    """Which node this is and where its Pods are described."""

    cni_agent_run_dir: Path = _setting(
        Path("/run/sidestep"), "Where the CNI socket is; the same path for agent and container runtime."
    )
    agent_timeout_seconds: float = _setting(
        10.0,
        "How long the plugin waits for the agent before it fails a mesh pod.",
        click.FloatRange(0, 600, min_open=True),
        ours=True,
    )
    pods: Path | None = _setting(
        None,
        "Directory of Pod manifests (.yaml, .yml, .json), for a node without API server.",
        click.Path(path_type=Path, exists=True, file_okay=False),
        ours=True,
    )
    kubernetes_node_name: str = _setting("", "Name of this node in the API: its pods are watched.")
    kubeconfig: Path | None = _setting(
        None, "kubeconfig of the API server  [default: the pod's service account]", _DIRECTORY, ours=True
    )
    kube_ca_file: Path | None = _setting(None, "CA of the API server  [default: the service account's]", _DIRECTORY)
    skip_tls_verify: bool = _setting(False, "Do not verify the API server's certificate.")
    pod_namespace: str = _setting("istio-system", "Namespace of the agent's own DaemonSet.")
    exclude_namespaces: tuple[str, ...] = _setting("", "Namespaces, by commas, whose pods are left alone.")
    proc: Path = _setting(Path("/proc"), "procfs of the node; /host/proc in a container.", ours=True)


@dataclass(frozen=True)
class Chain:
    """The plugin on the host: its file and its place in the CNI configuration."""

    install: bool = _setting(False, "Drop the plugin on the host and keep it in the CNI chain.", ours=True)
    mounted_cni_bin_dir: Path = _setting(Path("/host/opt/cni/bin"), "The host's plugin directory.")
    mounted_cni_net_dir: Path = _setting(Path("/host/etc/cni/net.d"), "The host's CNI configuration directory.")
    cni_conf_name: str = _setting(
        "", "Configuration file to edit  [default: the first valid one; standalone: YYY-sidestep-cni.conf]"
    )
    chained_cni_plugin: bool = _setting(True, "Append to the chain; false writes a file of our own (multus).")
    istio_owned_cni_config: bool = _setting(
        False, "Leave the primary configuration alone: write a file that comes before it and has all of it, and us."
    )
    istio_owned_cni_config_filename: str = _setting(
        _OWNED_FILE,
        "That file.",
        _ListName(),
        # what Istio's chart sets, though install-cni reads the other
        also=("ISTIO_OWNED_CNI_CONF_FILENAME",),
    )
    cni_conf_group_read: bool = _setting(False, "Mode 0640 instead of 0600 for a file of our own.")
    shim: Path = _setting(Path("/opt/cni/bin/sidestep-cni"), "The plugin to drop, in this image.", ours=True)


@dataclass(frozen=True)
class Repair:
    """What is done about pods that started without capture."""

    repair_enabled: bool = _setting(True, "Look for broken pods at all.")
    repair_repair_pods: bool = _setting(True, "Enrol them while they run. Goes before the other two.")
    repair_delete_pods: bool = _setting(False, "Delete them. Goes before labelling.")
    repair_label_pods: bool = _setting(False, "Label them.")
    repair_broken_pod_label_key: str = _setting("cni.istio.io/uninitialized", "Key of that label.")
    repair_broken_pod_label_value: str = _setting("true", "Value of that label.")
    repair_sidecar_annotation: str = _setting("sidecar.istio.io/status", "Annotation that makes a pod a mesh pod.")
    repair_init_container_name: str = _setting("istio-validation", "Init container whose failure tells.")
    repair_init_container_exit_code: int = _setting(126, "Exit code with which it fails; 0: any.")
    repair_init_container_termination_message: str = _setting("", "Message with which it fails; empty: any.")
    repair_label_selectors: str = _setting("", "Only pods with these labels.")
    repair_field_selectors: str = _setting("", "Only pods with these fields.")
    reconcile_seconds: float = _setting(
        180.0, "How often the maps are compared with the pods.", click.FloatRange(1), ours=True
    )


@dataclass(frozen=True)
class Acceleration:
    """How far connections within the node skip TCP's path."""

    acceleration: str = _setting(
        str(Level.PROXY),
        "The most that counts on this node: between proxies, or (full) to applications that ask for it too.",
        click.Choice(list(LEVELS)),
        ours=True,
    )

    @property
    def level(self) -> Level:
        """The chosen level."""
        return LEVELS[self.acceleration]


@dataclass(frozen=True)
class Ports:
    """Where health and metrics are served."""

    monitoring_port: int = _setting(15014, "Prometheus /metrics.", PORT)
    health_port: int = _setting(8000, "/healthz and /readyz.", PORT, ours=True)


def take(group: type[Group]) -> Callable[[Command], Command]:
    """Give a command every setting of a group as options; it gets them as one argument named after the group."""

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
    """Give a command one setting of a group, as an argument of its own name."""
    return _option(next(each for each in fields(group) if each.name == name))


def environment_variable(each: Any) -> str:
    """The environment variable of a field of a group."""
    name = each.name.upper()
    return f"SIDESTEP_{name}" if each.metadata["ours"] else name


def _option(each: Any) -> Callable[[Command], Command]:
    flag = f"--{each.name.replace('_', '-')}"
    kind = each.metadata["kind"]
    listed = each.name.endswith("namespaces")
    return click.option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        each.name,
        type=kind,
        default=each.default,
        envvar=[environment_variable(each), *each.metadata["also"]],
        show_envvar=True,
        show_default=each.default not in (None, ""),
        callback=_listed if listed else None,
        help=each.metadata["help"],
    )
