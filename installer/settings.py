"""Every setting of the node's side once: its flag, its environment variable (SIDESTEP_…) and its default."""

from dataclasses import dataclass
from pathlib import Path

import click

from bpf.kernel import attach_point
from bpf.pins import Pins

_DIRECTORY = click.Path(path_type=Path)

bpffs = click.option(
    "--bpffs",
    type=_DIRECTORY,
    default=Path("/sys/fs/bpf"),
    envvar="SIDESTEP_BPFFS",
    show_envvar=True,
    show_default=True,
    help="Mounted bpffs; pins live in its sidestep/ directory.",
)
cgroup = click.option(
    "--cgroup",
    type=_DIRECTORY,
    envvar="SIDESTEP_CGROUP",
    show_envvar=True,
    help="cgroup2 directory to attach at  [default: kubelet's, else the cgroup2 root]",
)
run_dir = click.option(
    "--run-dir",
    type=_DIRECTORY,
    default=Path("/run/sidestep"),
    envvar="SIDESTEP_RUN_DIR",
    show_envvar=True,
    show_default=True,
    help="Where the CNI socket is; cni_agent_run_dir in the plugin's configuration.",
)
pods = click.option(
    "--pods",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    envvar="SIDESTEP_PODS",
    show_envvar=True,
    help="Directory of Pod manifests (.yaml, .yml, .json).",
)
log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="SIDESTEP_LOG_LEVEL",
    show_envvar=True,
    show_default=True,
    help="Least severe lines to log.",
)


@dataclass(frozen=True)
class Attachment:
    """Where things are attached and pinned."""

    pins: Pins
    cgroup: Path

    @classmethod
    def of(cls, bpffs: Path, cgroup: Path | None) -> "Attachment":
        """The chosen or the discovered cgroup. Raises KernelRefused when there is no cgroup2."""
        return cls(Pins(bpffs), cgroup or attach_point())
