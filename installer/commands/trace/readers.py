"""Whether anybody still reads the trace: `kubectl exec` without a terminal leaves what it started to itself."""

import os
import select
import stat

_STDIN, _STDOUT = 0, 1


class Readers:
    """The other ends of standard output and input, as far as they were there at the start.

    If standard input is a pipe or socket that somebody holds open, that is `kubectl exec -i` or ssh, and its end is
    theirs. A file, /dev/null, a terminal, or an end that was closed from the start says nothing.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        for descriptor in (_STDOUT, _STDIN):
            if _is_pipe(descriptor) and not _has_ended(descriptor):
                self._poll.register(descriptor, 0)  # POLLERR and POLLHUP are always told

    def have_gone(self) -> bool:
        """Whether one of them has been closed since."""
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in self._poll.poll(0))


def _is_pipe(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # it is not open
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
