"""One node's life: the agent, where its Pods come from, and the `sidestep` command."""

VERSION = "0.1.0"  # as in pyproject.toml, which the image doesn't carry
