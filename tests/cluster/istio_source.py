"""Istio's module, which its programs are built from: its release, and what else is in it."""

from functools import cache
from pathlib import Path

from tests.cluster.builder import module_directory
from tests.cluster.components import component

_PROGRAM = "pilot-discovery"


def release() -> str:
    """As go.mod pins it."""
    return component(_PROGRAM).version


@cache
def source() -> Path:
    """The module's folder."""
    return module_directory(component(_PROGRAM))


def manifests() -> Path:
    """Istio's charts and profiles."""
    return source() / "manifests"
