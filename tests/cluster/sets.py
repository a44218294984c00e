"""Values on a command line, as Helm and istioctl take them."""

from collections.abc import Iterable


def sets(values: Iterable[str]) -> list[str]:
    """The words for these, NAME=VALUE each."""
    return [word for value in values for word in ("--set", value)]
