"""Which releases a cluster is made of: by default Kubernetes 1.36 and the distribution's containerd.

The variables KUBERNETES and CONTAINERD choose others. What they may be stands here alone.
"""

import os

from tests.cluster.variables import chosen

# release → the folder of modules/ that pins it
KUBERNETES = {"1.36": "kubernetes", "1.37": "kubernetes-1.37"}
_USUAL = "1.36"
DISTRIBUTION = "distribution"
CONTAINERD = (DISTRIBUTION, "2.4")


def folder() -> str:
    """Of the programs in build/cluster: one for each Kubernetes, so that who changes between them compiles nothing."""
    value = os.environ.get("KUBERNETES") or _USUAL
    return "bin" if value == _USUAL else f"bin-{value}"


def kubernetes() -> str:
    """The release of Kubernetes. Raises UnknownValue."""
    return chosen("KUBERNETES", KUBERNETES, _USUAL)


def containerd() -> str:
    """The release of containerd, or `distribution`. Raises UnknownValue."""
    return chosen("CONTAINERD", CONTAINERD, DISTRIBUTION)


def has_user_namespaces() -> bool:
    """Whether a pod may have a user namespace of its own: containerd 1.6 and runc 1.1 can't make one."""
    return containerd() != DISTRIBUTION
