"""Whether capture will work on this node: what is looked at, what was found, how it is told."""
