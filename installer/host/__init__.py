"""Changes to the host: installs the plugin, puts it into the CNI configuration, and undoes both."""
