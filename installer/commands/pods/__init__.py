"""`sidestep pods`: enrolled pods, their policies in Istio's words, how they differ from their Pods now."""
