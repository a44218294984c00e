"""The Helm chart, with a real Helm."""
