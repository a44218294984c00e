"""What Istio's tests are made of: a program for each package of tests, and the servers that the tests have in pods.

All are built inside of Istio's module, with the dependencies that Istio itself builds them with.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.components import MODULES, Component
from tests.cluster.istio_source import source

_MODULE = "istio.io/istio"
# the servers' names in BIN → their packages
SERVERS = {
    "echo-server": "pkg/test/echo/cmd/server",
    "echo-client": "pkg/test/echo/cmd/client",
    "ext-authz": "samples/extauthz/cmd/extauthz",
    "jwt-server": "samples/jwt-server/src",
}


class OfIstio(Component):
    """A program of Istio's module."""

    def directory(self) -> Path:
        return source()


class Tests(OfIstio):
    """The program that `go test` makes of a package."""

    def command(self) -> list[str]:
        return ["test", "-c"]

    def flags(self) -> list[str]:
        # not trimmed: by the paths in it, it finds the files of the module that it applies to the cluster
        return ["-tags=integ", "-vet=off", "-ldflags=-s -w"]


@dataclass(frozen=True)
class Package:
    """One of Istio's packages of tests, `tests/integration/NAME`."""

    name: str

    @property
    def program(self) -> Tests:
        """Its tests."""
        path = f"{_MODULE}/tests/integration/{self.name}"
        return Tests(f"{self.name}.test", path, MODULES / "istio", _MODULE)

    def folder(self) -> Path:
        """Where its tests want to run."""
        return source() / "tests" / "integration" / self.name


def servers() -> list[Component]:
    """Those that run in pods."""
    return [OfIstio(name, f"{_MODULE}/{package}", MODULES / "istio", _MODULE) for name, package in SERVERS.items()]
