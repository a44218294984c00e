"""`sidestep migrate`: what stands between this node's istio-cni and sidestep."""
