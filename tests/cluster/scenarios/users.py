"""Pods with user namespaces of their own (`hostUsers: false`): the proxy's user is another one to the node."""

from collections.abc import Iterator
from functools import partial

import click

from tests.cluster import versions
from tests.cluster.bed import FAR, NAMESPACE, Bed
from tests.cluster.checks import Check, answered_by, at_once, equals, soon
from tests.cluster.pods import PodName

OWN_USERS, OTHER_USERS = PodName(NAMESPACE, "own-users"), PodName(NAMESPACE, "other-users")


def checks(bed: Bed) -> Iterator[Check]:
    """Two on one node, which the kernel gives different users."""
    if not versions.has_user_namespaces():
        click.echo("users: not run: containerd 1.6 makes no user namespaces, CONTAINERD=2.4 does")
        return
    node = bed.cluster.nodes[0]
    made = (OWN_USERS, OTHER_USERS)
    try:
        for pod in made:
            bed.pods.make(pod, node.name, hostUsers=False)
        bed.pods.wait_until_ready(*made)
        for pod in made:
            shifted = partial(_is_nodes_user, bed, pod)
            yield Check(f"root in {pod} is another user to the node", equals(shifted, False))
            captured = partial(bed.sidestep.captures, node.name, str(pod))
            yield Check(f"sidestep captures {pod}", equals(captured, True))
        yield from at_once(_mutual(bed))
    finally:
        bed.pods.delete(*made)


def _mutual(bed: Bed) -> Iterator[Check]:
    """A proxy whose user is not known would call itself, and an application would pass for the proxy."""
    for client, server in ((OWN_USERS, OTHER_USERS), (OTHER_USERS, FAR), (FAR, OWN_USERS)):
        named = (f"By={server.spiffe}", f"URI={client.spiffe}")
        yield Check(
            f"{client} and {server} talk mTLS", soon(answered_by(bed.pods, client, server.host, server, *named))
        )


def _is_nodes_user(bed: Bed, pod: PodName) -> bool:
    """By the first line of user_namespaces(7)'s uid_map: 0 in the pod is 0 outside."""
    first, outside, _ = bed.pods.run(pod, "cat", "/proc/self/uid_map").splitlines()[0].split()
    return first == outside
