"""Which releases a cluster is made of: by default Kubernetes 1.36 and the distribution's containerd.

The variables KUBERNETES and CONTAINERD choose others. What they may be stands here alone.
"""

import os
from collections.abc import Collection

import click

# release → the folder of modules/ that pins it
KUBERNETES = {"1.36": "kubernetes", "1.37": "kubernetes-1.37"}
_USUAL = "1.36"
DISTRIBUTION = "distribution"
CONTAINERD = (DISTRIBUTION, "2.4")


class UnknownVersion(click.ClickException):
    """One line: the variable, its value, and what it may be."""


def folder() -> str:
    """Of the programs in build/cluster: one for each Kubernetes, so that who changes between them compiles nothing."""
    value = os.environ.get("KUBERNETES") or _USUAL
    return "bin" if value == _USUAL else f"bin-{value}"


def kubernetes() -> str:
    """The release of Kubernetes. Raises UnknownVersion."""
    return _chosen("KUBERNETES", KUBERNETES, _USUAL)


def containerd() -> str:
    """The release of containerd, or `distribution`. Raises UnknownVersion."""
    return _chosen("CONTAINERD", CONTAINERD, DISTRIBUTION)


def _chosen(variable: str, known: Collection[str], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in known:
        raise UnknownVersion(f"{variable}={value} is none of {', '.join(known)}")
    return value
