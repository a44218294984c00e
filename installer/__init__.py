"""The node's side of sidestep: the agent, its source of Pods, and the `sidestep` command."""

VERSION = "0.1.0"  # the only place of the version: pyproject.toml and the image's label read it
