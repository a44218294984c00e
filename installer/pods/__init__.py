"""Where Pods come from: a directory of manifests, or the API server's watch of this node."""
