"""What a user chooses of a cluster by environment variables, which `make` passes on."""

import os
from collections.abc import Collection

import click


class UnknownValue(click.ClickException):
    """One line: the variable, its value, and what it may be."""


def chosen(variable: str, known: Collection[str], default: str) -> str:
    """The variable's value, or `default` if it has none. Raises UnknownValue if it is not in `known`."""
    value = os.environ.get(variable) or default
    if value not in known:
        raise UnknownValue(f"{variable}={value} is none of {', '.join(known)}")
    return value
