"""Servers in several languages; README.md says what they do."""
