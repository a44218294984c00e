"""Helm, built from its module, and what it makes of the chart."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.builder import BIN
from tests.lab.node import REPOSITORY

CHART = REPOSITORY / "manifests" / "charts" / "sidestep"
# the oldest that Kubernetes still mends when this was written, the one of `make cluster`, and the newest
VERSIONS = ("1.35", "1.36", "1.37")
NAMESPACE = "istio-system"
HELM = BIN / "helm"


def helm(*argv: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run it; `given` is its standard input."""
    if not HELM.exists():
        raise FileNotFoundError(f"{HELM} is not there; `make chart` builds it")
    return subprocess.run([HELM, *argv], input=given, capture_output=True, text=True, timeout=60)


def template_text(version: str = "1.36", namespace: str = NAMESPACE, **values: Any) -> str:
    """What the chart renders to with these values, for this version of Kubernetes. `global_` is the value `global`."""
    done = _template(version, namespace, values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def template(version: str = "1.36", namespace: str = NAMESPACE, **values: Any) -> list[dict[str, Any]]:
    """The same, as objects."""
    documents = yaml.safe_load_all(template_text(version, namespace, **values))
    return [each for each in documents if each]


def refusal(version: str = "1.36", **values: Any) -> str:
    """What Helm says of values that the chart does not take."""
    done = _template(version, NAMESPACE, values)
    assert done.returncode != 0, done.stdout
    return done.stderr


def document(**values: Any) -> str:
    """The values as a file for Helm."""
    return json.dumps({name.removesuffix("_"): value for name, value in values.items()})


def _template(version: str, namespace: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    full = version if version.count(".") > 1 else f"{version}.0"
    options = ("--namespace", namespace, "--kube-version", full, "--values", "-")
    return helm("template", "sidestep", CHART, *options, given=document(**values))
