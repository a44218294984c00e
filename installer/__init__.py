"""One node's life: the agent, where its Pods come from, and the `sidestep` command."""

VERSION = "0.1.0"  # stands here alone: pyproject.toml and the image's label read it
