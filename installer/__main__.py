"""python -m installer: the same as `sidestep`."""

from installer.cli import main

main()
