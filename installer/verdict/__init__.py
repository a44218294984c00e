"""The verdict on a node: OK, or what is wrong and what to do about each fault."""
