"""Keeps the plugin on the host and in the CNI chain as long as the agent runs.

One thread installs, then sleeps until one of the two directories changes, checks, and repairs. It compares contents, so
its own writes, and writes that change nothing, cause no further repair.
"""

import errno
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from installer.host import files, plugin
from installer.host.candidates import NoConf
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory, Edit
from installer.host.files import FileRefused
from installer.host.rival import in_the_way, serving_rival
from installer.host.watching import DirectoryWatcher
from installer.settings import Chain, Node

log = structlog.get_logger("install")

# pause after a wake-up: one change of a directory comes as several events. Far below the second within which the
# installer repairs
_SETTLE_SECONDS = 0.05
# Istio's install-cni calls it a fight if it has to repair more than 5 times in a row, less than 5 s apart
_FIGHT_REPAIRS, _FIGHT_SECONDS = 5, 25.0
# pause between repairs in a fight. Pods start uncaptured while our entry is missing, so it stays below a second
_FIGHT_PAUSE = 0.8
_FIGHT_SAID_SECONDS = 30.0
# by the type of a plugin in the file: how to make its installer keep other plugins' entries
_ADVICE = {"cilium-cni": "set Cilium's cni.exclusive=false"}
_OTHER_ADVICE = "another installer rewrites the file; make it keep other plugins, or set ISTIO_OWNED_CNI_CONFIG=true"

SUCCESS, NO_BINARY, NO_CONF = "SUCCESS", "COPY_BINARIES_FAILURE", "CREATE_CNI_CONFIG_FAILURE"


class Installer:
    """Installs and repairs while running(). When that ends, everything stays in place."""

    def __init__(
        self,
        chain: Chain,
        node: Node,
        on_result: Callable[[str], None],
        on_ready: Callable[[bool, str], None],
        may_stand_by: bool = False,
    ) -> None:
        """Set the callbacks. `may_stand_by` says that it is as it should be if the chain is left to istio-cni.

        `on_result` gets the label values of istio_cni_installs_total. `on_ready` gets whether everything is in place,
        and if not, why.
        """
        self._chain = chain
        self._conf = ConfDirectory(chain, entry_of(node))
        self._proc = node.proc
        self._on_result, self._on_ready = on_result, on_ready
        self._may_stand_by = may_stand_by
        self._failure = ""
        self._conflicts = Conflicts()
        self._stopping = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._watcher = DirectoryWatcher((chain.mounted_cni_bin_dir, chain.mounted_cni_net_dir), self._wake)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Install and repair in a thread until the context ends."""
        thread = threading.Thread(target=self._run, name="install")
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._waker.send(b"x")
            thread.join()
            self._wake.close()
            self._waker.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._watcher.armed() as watch:  # before the check, so that no change is missed
                pause = self._conflicts.pause(self._round())
                watch.wait()
            self._stopping.wait(pause or _SETTLE_SECONDS)

    def _round(self) -> list[Edit]:
        """Check and repair once; returns the corrections. A failure is logged, and the next change tries again."""
        try:
            return self._install()
        except Exception as error:  # no bug may end the thread that repairs
            log.exception("install.crashed")
            self._on_ready(False, f"internal error: {type(error).__name__}: {error}; please report it with the log")
            return []

    def _install(self) -> list[Edit]:
        edits = []
        try:
            files.clear_leftovers(self._chain.mounted_cni_bin_dir)
            if plugin.drop(self._chain.shim, self._chain.mounted_cni_bin_dir):
                edits.append(Edit(str(self._chain.mounted_cni_bin_dir / PLUGIN), (), "missing or changed", 0))
        except FileRefused as error:
            return self._failed(NO_BINARY, _with_setting(error, "MOUNTED_CNI_BIN_DIR"))
        try:
            files.clear_leftovers(self._conf.path)
            if self._stands_by():
                return []
            edits += self._conf.enter()
        except NoConf as waiting:
            self._on_ready(False, str(waiting))
            return edits
        except FileRefused as error:
            return self._failed(NO_CONF, _with_setting(error, "MOUNTED_CNI_NET_DIR"))
        for edit in edits:
            log.info("plugin.installed", file=edit.file, found=edit.fault, plugins=" ".join(edit.plugins))
        if edits or self._failure:
            self._on_result(SUCCESS)
        self._failure = ""
        self._on_ready(True, "")
        return edits

    def _stands_by(self) -> bool:
        """Leave the chain to istio-cni if its agent runs. Once it ends, the directory changes, and we enter."""
        found = self._conf.replaced()
        if not serving_rival((entry for _, entry in found), self._proc):
            return False
        left, why = self._conf.leave(), in_the_way(found[0][0])
        if left or why != self._failure:
            log.warning("chain.left", reason=why)
        self._failure = why
        self._on_ready(self._may_stand_by, why)
        return True

    def _failed(self, result: str, why: str) -> list[Edit]:
        """Log a failure once as long as it stays the same: a missing directory is looked for twice a second."""
        if why != self._failure:
            self._failure = why
            self._on_result(result)
            log.error("install.failed", result=result, error=why)
        self._on_ready(False, why)
        return []


def _with_setting(error: FileRefused, setting: str) -> str:
    """The error, with a hint at the setting: a missing or read-only directory is usually the wrong one."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error}; check that {setting} is this platform's directory"
    return str(error)


class Conflicts:
    """Notices if another program keeps undoing our edits, names it in the log, and slows down to spare the node."""

    def __init__(self) -> None:
        self._said = -_FIGHT_SAID_SECONDS
        self._recent: deque[float] = deque(maxlen=_FIGHT_REPAIRS + 1)
        self._repairs = 0

    def pause(self, edits: list[Edit]) -> float:
        """Seconds to pause after a round with these corrections; 0 unless it is a fight."""
        if not edits:
            return 0.0
        now = time.monotonic()
        self._recent.append(now)
        self._repairs += 1
        if len(self._recent) <= _FIGHT_REPAIRS or now - self._recent[0] > _FIGHT_SECONDS:
            return 0.0
        if now - self._said > _FIGHT_SAID_SECONDS:
            self._said = now
            self._say(edits[-1])
        return _FIGHT_PAUSE

    def _say(self, edit: Edit) -> None:
        log.warning(
            "chain.contested",
            file=edit.file,
            found=edit.fault,
            plugins=" ".join(edit.plugins),
            uid=edit.uid,
            repairs=self._repairs,
            advice=next((_ADVICE[kind] for kind in edit.plugins if kind in _ADVICE), _OTHER_ADVICE),
        )
