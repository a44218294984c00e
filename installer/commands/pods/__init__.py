"""`sidestep pods`: shows enrolled pods, their policies in Istio's words, and what their Pods ask for now."""
