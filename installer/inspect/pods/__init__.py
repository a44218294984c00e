"""Enrolled pods: their policies in Istio's words, their namespaces, how they differ from their Pods now."""
