"""Keeps the plugin on the host and in the CNI chain, as long as the agent runs.

One thread installs, then sleeps until something in one of the two directories changes, looks, and repairs. What it
compares is content, so its own writes and those that change nothing end the matter.
"""

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import structlog
from inotify_simple import INotify, flags

from installer.host import files, plugin
from installer.host.chain import entry_of
from installer.host.confdir import ConfDirectory, NoConf
from installer.host.files import FileRefused
from installer.settings import Chain, Node

log = structlog.get_logger("install")

_CHANGES = (
    flags.CREATE
    | flags.CLOSE_WRITE
    | flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.DELETE
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
)
# one change of a directory comes as several events; far below the second within which things are repaired
_SETTLE_SECONDS = 0.05
# also without an event, as a directory that is mounted over tells nobody
_LOOK_SECONDS = 30.0
# install-cni calls it a fight when it has to repair more than 5 times in a row, less than 5 s apart
_FIGHT_REPAIRS, _FIGHT_SECONDS = 5, 25.0
# then once a second has to do: between the two writers pods would start uncaptured, so it must not be long
_FIGHT_PAUSE = 1.0
_FIGHT_SAID_SECONDS = 30.0

SUCCESS, NO_BINARY, NO_CONF = "SUCCESS", "COPY_BINARIES_FAILURE", "CREATE_CNI_CONFIG_FAILURE"


class Installer:
    """Installs and repairs while running(); ending it leaves everything in place."""

    def __init__(
        self, chain: Chain, node: Node, on_result: Callable[[str], None], on_ready: Callable[[bool, str], None]
    ) -> None:
        """`on_result` gets the values of istio_cni_installs_total; `on_ready` whether all is in place, or why not."""
        self._chain = chain
        self._conf = ConfDirectory(chain, entry_of(node))
        self._on_result, self._on_ready = on_result, on_ready
        self._said = -_FIGHT_SAID_SECONDS
        self._repairs: deque[float] = deque(maxlen=_FIGHT_REPAIRS + 1)
        self._stopping = threading.Event()
        self._wake, self._waker = socket.socketpair()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Install and repair in a thread of its own meanwhile."""
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
            with ExitStack() as watching:
                inotify = watching.enter_context(INotify())
                self._watch(inotify)  # before looking, so that nothing happens in between unseen
                changed = self._install()
                self._wait(inotify)
            if changed:
                self._pause_in_a_fight()

    def _install(self) -> bool:
        """Whether something had to be done. What can't be done is said, and tried again when something changes."""
        try:
            files.clear_leftovers(self._chain.mounted_cni_bin_dir)
            changed = plugin.drop(self._chain.shim, self._chain.mounted_cni_bin_dir)
        except FileRefused as error:
            return self._failed(NO_BINARY, str(error))
        try:
            files.clear_leftovers(self._conf.path)
            before = self._conf.present()
            entered = self._conf.enter()
        except NoConf as waiting:
            self._on_ready(False, str(waiting))
            return changed
        except FileRefused as error:
            return self._failed(NO_CONF, str(error))
        if changed or entered:
            self._on_result(SUCCESS)
            log.info("plugin.installed", shim=changed, conf=entered, before=" ".join(before))
        self._on_ready(True, "")
        return changed or entered

    def _failed(self, result: str, why: str) -> bool:
        self._on_result(result)
        self._on_ready(False, why)
        log.error("install.failed", result=result, error=why)
        return False

    def _watch(self, inotify: INotify) -> None:
        for directory in (self._chain.mounted_cni_bin_dir, self._conf.path):
            try:
                inotify.add_watch(directory, _CHANGES | flags.ONLYDIR)
            except OSError as error:
                log.warning("watch.failed", directory=str(directory), error=error.strerror)

    def _wait(self, inotify: INotify) -> None:
        """Until something that isn't our own unfinished file has changed, somebody stops us, or it has been long."""
        deadline = time.monotonic() + _LOOK_SECONDS
        with selectors.DefaultSelector() as ready:
            ready.register(inotify, selectors.EVENT_READ)
            ready.register(self._wake, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                found = [key.fileobj for key, _ in ready.select(left)]
                if self._wake in found:
                    return
                if inotify in found and any(not files.is_temporary(event.name) for event in inotify.read(timeout=0)):
                    self._stopping.wait(_SETTLE_SECONDS)
                    return

    def _pause_in_a_fight(self) -> None:
        """Somebody undoes what we do: say who, and slow down, so that neither of us makes the node busy."""
        now = time.monotonic()
        self._repairs.append(now)
        if len(self._repairs) <= _FIGHT_REPAIRS or now - self._repairs[0] > _FIGHT_SECONDS:
            return
        if now - self._said > _FIGHT_SAID_SECONDS:
            self._said = now
            log.warning(
                "chain.contested",
                directory=str(self._conf.path),
                plugins=" ".join(self._conf.present()),
                advice="another installer rewrites the configuration; with Cilium set cni.exclusive=false",
            )
        self._stopping.wait(_FIGHT_PAUSE)
