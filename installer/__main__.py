"""python -m installer: the same as `sidestep`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # while modules are imported Ctrl-C just ends the process; main() is the first that can do so politely
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from installer.commands.cli import main

main()
