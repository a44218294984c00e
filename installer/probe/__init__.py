"""Examines whether capture will work on this node, and reports the findings."""
