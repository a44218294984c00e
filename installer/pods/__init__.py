"""The source of Pods: a directory of manifests, or a watch of this node's Pods on the API server."""
