"""The manual, made of what --help shows: pages for man(1), and docs/cli.md."""
