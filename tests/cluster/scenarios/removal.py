"""sidestep is taken away under load and comes back: its DaemonSet is deleted, then its whole namespace."""

from collections.abc import Iterator

from tests.cluster.bed import Bed
from tests.cluster.checks import Check, equals
from tests.cluster.load.load import load_on
from tests.cluster.newcomers import enrolled_after
from tests.cluster.sidestep import NAMESPACE

_CA = "istio-ca-secret"  # istiod makes another one if it finds none, which old and new proxies would not agree about


def checks(bed: Bed) -> Iterator[Check]:
    """Running pods stay captured all the while, and new pods are enrolled afterwards."""
    with load_on(bed) as load:
        try:
            yield load.during("the DaemonSet is deleted", bed.sidestep.delete)
            for node in bed.cluster.nodes:
                yield Check(f"the plugin is out of {node.name}'s chain", equals(node.plugins, ["bridge", "portmap"]))
        finally:
            again = load.during("the DaemonSet is applied again", bed.sidestep.apply)
        yield again
        yield from enrolled_after(bed, "DaemonSet")
        authority = bed.control.get("secret", "-n", NAMESPACE, _CA)
        try:
            yield load.during("the namespace is deleted", lambda: bed.control.kubectl("delete", "namespace", NAMESPACE))
        finally:
            again = load.during("the namespace is made again", lambda: _install(bed, authority["data"]))
        yield again
        yield from enrolled_after(bed, "namespace")


def _install(bed: Bed, authority: dict[str, str]) -> None:
    """sidestep, then istiod with the authority that it had."""
    bed.control.make_namespace(NAMESPACE)
    secret = {"metadata": {"name": _CA, "namespace": NAMESPACE}, "type": "istio.io/ca-root", "data": authority}
    bed.control.apply({"apiVersion": "v1", "kind": "Secret", **secret})
    bed.sidestep.apply()
    bed.mesh.install_charts()
