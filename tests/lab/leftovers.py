"""What a lab's runtime writes outside of the lab's directory, where its programs let nobody choose the place."""

from pathlib import Path

# containerd 1.6, runtime/v2/shim: sockets are in defaults.DefaultStateDir whatever the state directory is; each bundle
# says which is its own
_BUNDLES = "containerd/state/io.containerd.runtime.v2.task/k8s.io"
# libcni's CacheDir: <network>-<container>-<interface>
_RESULTS = Path("/var/lib/cni/results")


def outside(directory: Path) -> list[Path]:
    """Files of the lab in `directory` that are elsewhere: sockets of shims, results of CNI plugins."""
    found = []
    for bundle in (directory / _BUNDLES).glob("*"):
        address = bundle / "address"
        if address.exists():
            found.append(Path(address.read_text().removeprefix("unix://")))
        found += _RESULTS.glob(f"*-{bundle.name}-*")
    return found + list(_RESULTS.glob(f"lab-{directory.name}-*"))
