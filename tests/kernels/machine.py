"""Boots a kernel under software emulation with this machine's files, runs one command, returns what it printed."""

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.kernels.package import Kernel
from tests.lab.waiting import wait_until

_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
_MEMORY = "2G"
_SECONDS = 900  # emulated; some thirty times slower than the machine itself


class BootFailed(Exception):
    """The machine did not come to the end of its command; with what its console showed last."""


def run(kernel: Kernel, command: str) -> str:
    """The command's output. No blanks in its words. Raises BootFailed."""
    with ExitStack() as up:
        directory = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="sidestep-kernel-")))
        shared, output, console = directory / "shared", directory / "output", directory / "console"
        files = subprocess.Popen(
            [_VIRTIOFSD, f"--socket-path={shared}", "-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        up.callback(files.wait)
        up.callback(files.kill)
        wait_until(shared.exists, "virtiofsd to listen", 20)
        try:
            subprocess.run(_argv(kernel, command, shared, output, console), check=True, timeout=_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise BootFailed(f"{error}\n{_tail(console)}") from error
        printed, ended, status = output.read_text(errors="replace").rpartition("ended with ")
        if not ended or status.strip() not in ("0", "1"):
            raise BootFailed(f"{command}: ended with {status.strip() or 'nothing'}\n{printed}\n{_tail(console)}")
        return printed


def _argv(kernel: Kernel, command: str, shared: Path, output: Path, console: Path) -> list[str | Path]:
    # on a busy host the emulated timer may come too late for the kernel's own check of it
    words = f"console=ttyS0 panic=-1 quiet no_timer_check -- --command={command.replace(' ', '+')}"
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,cx16=off", "-smp", "2", "-m", _MEMORY),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on", "-numa", "node,memdev=memory"),
        *("-chardev", f"socket,id=files,path={shared}", "-device", "vhost-user-fs-pci,chardev=files,tag=root"),
        *("-serial", f"file:{console}", "-serial", f"file:{output}"),
        *("-kernel", kernel.image, "-initrd", kernel.initramfs, "-append", words),
    ]


def _tail(console: Path) -> str:
    return "\n".join(console.read_text(errors="replace").splitlines()[-20:]) if console.exists() else ""
