"""The command line, a module for each group of commands. They import what they need when they run."""
