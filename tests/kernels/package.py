"""A distribution's kernel: its package fetched and unpacked, and what its first process needs in an initramfs."""

import lzma
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.lab.node import REPOSITORY

_CACHE = REPOSITORY / "build" / "kernels"
# reaching the host's files, and what the programs are tried on; those that a kernel has built in are not looked for
_MODULES = ("virtio_pci", "virtiofs", "overlay", "veth", "bridge", "tls")


@dataclass(frozen=True)
class Kernel:
    """Ready to boot."""

    version: str
    image: Path
    initramfs: Path


def fetch(metapackage: str) -> Kernel:
    """The kernel that a package of Debian's depends on now, such as linux-image-cloud-amd64."""
    package = _dependency(metapackage)
    directory = _CACHE / package
    if not (directory / "lib").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        as_root = ("-o", "APT::Sandbox::User=root")  # apt's own user may not write here
        subprocess.run(["apt-get", "-qq", *as_root, "download", package], cwd=directory, check=True)
        (archive,) = directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
    _make_initramfs(directory, _version(directory))
    version = _version(directory)
    return Kernel(version, directory / "boot" / f"vmlinuz-{version}", directory / "initramfs")


def _dependency(metapackage: str) -> str:
    shown = subprocess.run(["apt-cache", "depends", metapackage], capture_output=True, text=True, check=True).stdout
    return next(line.split()[-1] for line in shown.splitlines() if line.strip().startswith("Depends: linux-image-"))


def _version(directory: Path) -> str:
    (modules,) = (directory / "lib" / "modules").iterdir()
    return modules.name


def _make_initramfs(directory: Path, version: str) -> None:
    root = directory / "root"
    shutil.rmtree(root, ignore_errors=True)
    for each in ("bin", "modules", "proc", "host", "upper", "new"):
        (root / each).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    shutil.copy(Path(__file__).with_name("init.sh"), root / "init")
    (root / "init").chmod(0o755)
    subprocess.run(["depmod", "-b", directory, version], check=True)
    for number, module in enumerate(_in_order(directory / "lib" / "modules" / version)):
        plain = lzma.decompress(module.read_bytes()) if module.suffix == ".xz" else module.read_bytes()
        (root / "modules" / f"{number:02d}-{_name(module)}.ko").write_bytes(plain)
    names = "\n".join(str(each.relative_to(root)) for each in sorted(root.rglob("*")))
    with (directory / "initramfs.new").open("wb") as archive:
        argv = ["busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(argv, cwd=root, input=names.encode(), stdout=archive, check=True)
    (directory / "initramfs.new").rename(directory / "initramfs")


def _in_order(modules: Path) -> list[Path]:
    """The wanted modules behind those that they depend on, as modules.dep(5) tells."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[_name(Path(path))] = [*reversed(others.split()), path]
    ordered = [path for name in _MODULES for path in needs.get(name, [])]
    return [modules / path for path in dict.fromkeys(ordered)]


def _name(module: Path) -> str:
    """virtiofs of virtiofs.ko.xz."""
    return module.name.partition(".ko")[0]
