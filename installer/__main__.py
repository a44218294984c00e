"""python -m installer: the same as `sidestep`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # until main() handles Ctrl-C, it ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from installer.commands.cli import main

main()
