"""Requests that mesh pods send to each other without a pause, each looked at and counted."""
