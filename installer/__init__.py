"""One node's life: the agent, where its Pods come from, and the `sidestep` command."""
