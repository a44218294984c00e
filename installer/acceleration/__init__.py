"""The node's acceleration level: the self-test that tries this kernel, and the level that follows from it."""
