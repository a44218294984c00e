"""What the agent does to its host: the plugin, its place in the CNI configuration, and undoing both."""
