"""An agent ends when it is told to, whatever it is doing at that moment."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

LOGGING = """
import io, signal, sys, structlog
from installer.agent.signals import Signals

class Interrupted(io.TextIOBase):
    "A log during whose lines a signal arrives."
    def write(self, text):
        if "serving" in text:
            signal.raise_signal(signal.SIGTERM)
        return sys.stdout.write(text)

structlog.configure(logger_factory=structlog.PrintLoggerFactory(Interrupted()))
with Signals() as signals:
    signals.call(lambda: sys.stdout.write("asked to stop\\n"), -1)
    structlog.get_logger().info("agent.serving")
"""

# the signal is handled while the main thread waits and is not interrupted, as when it comes just before the waiting
UNSEEN = """
import select, signal, socket, threading, time
from installer.agent.signals import Signals

woken, wakes = socket.socketpair()
wakes.setblocking(False)
with Signals() as signals:
    signals.call(lambda: print("asked to stop"), wakes.fileno())
    elsewhere = lambda: (time.sleep(0.5), signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    threading.Thread(target=elsewhere).start()
    print("woken" if select.select([woken], [], [], 30)[0] else "asleep")
"""


def test_a_signal_in_the_middle_of_a_line_of_the_log() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("asked to stop\n")
    assert "agent.stopped" in done.stdout.splitlines()[-1]
    assert "SIGTERM" in done.stdout


def test_a_signal_that_does_not_interrupt_the_waiting_ends_it() -> None:
    done = subprocess.run([sys.executable, "-c", UNSEEN], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()[:2]) == ["asked to stop", "woken"]
