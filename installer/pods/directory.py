"""Pods from a directory of ordinary manifests, for nodes without an API server."""

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import yaml
from pydantic import ValidationError

from cni.errors import PodNotFound
from cni.policy.pod import Pod

SUFFIXES = (".yaml", ".yml", ".json")

# the loader of libyaml is ten times as fast, but not every PyYAML has it
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# called at each change with the Pod before and after it; None means there was, or is, none
Listener = Callable[[Pod | None, Pod | None], None]
# seconds between checks of the directory for the listeners
_LOOK_SECONDS = 0.5
# of a file: thousands of Pods
_MOST_BYTES = 32 << 20

# mtime, ctime, size and inode tell whether a file has changed; ctime, because a chmod may make it readable
Stamp = tuple[int, int, int, int]
_GONE: Stamp = (0, 0, 0, 0)


@dataclass(frozen=True)
class _Manifest:
    """The content of a file when it was last read."""

    stamp: Stamp
    pods: tuple[Pod, ...] = ()
    problem: str = ""


class PodDirectory:
    """Pods from the *.yaml, *.yml and *.json files of one directory: `kind: Pod`, or a `kind: List` of Pods.

    Every find() reads changed files again, so manifests may come, change and go at any time. A file that can't be read
    or parsed counts as empty; each change of such a file is logged once. Safe to use from many threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = structlog.get_logger()
        self._lock = threading.Lock()
        self._manifests: dict[str, _Manifest] = {}
        self._pods: dict[tuple[str, str], list[Pod]] = {}
        self._listeners: list[Listener] = []
        self._stopping = threading.Event()

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` at each change that is seen while running()."""
        self._listeners.append(listener)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look for changes, in a thread, until the context ends."""
        thread = threading.Thread(target=self._run, name="manifests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def _run(self) -> None:
        known: dict[tuple[str, str, str | None], Pod] = {}
        while not self._stopping.wait(_LOOK_SECONDS):
            found = self.every()
            if found is None:
                continue
            now = {(pod.namespace, pod.name, pod.uid): pod for pod in found}
            for key in {*known, *now}:
                before, after = known.get(key), now.get(key)
                if before is not after:  # the Pods of an unchanged file are the same objects
                    self._tell(before, after)
            known = now

    def _tell(self, before: Pod | None, after: Pod | None) -> None:
        """Call every listener. An error of one listener must stop neither the others nor the thread."""
        for listener in self._listeners:
            try:
                listener(before, after)
            except Exception:
                self._log.exception("manifest.listener_failed")

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        """The Pod of that name. UIDs are compared only if both the caller and the manifest have one.

        Raises PodNotFound. Its message names the files that could not be read: the Pod may be in one of them.
        """
        with self._lock:
            try:
                self._refresh()
            except OSError as error:
                raise PodNotFound(
                    f"Pod {namespace}/{name} cannot be looked up: {self.path}: {error.strerror}"
                ) from error
            candidates = self._pods.get((namespace, name), [])
            broken = [file for file, manifest in self._manifests.items() if manifest.problem]

        for pod in candidates:
            if uid is None or pod.uid is None or pod.uid == uid:
                return pod
        raise PodNotFound(self._not_found(namespace, name, uid, candidates, broken))

    def every(self) -> list[Pod] | None:
        """The Pods of all manifests; None if the directory can't be read."""
        with self._lock:
            try:
                self._refresh()
            except OSError:
                return None
            return [pod for pods in self._pods.values() for pod in pods]

    def _refresh(self) -> None:
        stamps = dict(sorted(self._stamps()))
        changed = {
            file: self._read(file, stamp)
            for file, stamp in stamps.items()
            if file not in self._manifests or self._manifests[file].stamp != stamp
        }
        if not changed and len(stamps) == len(self._manifests):
            return
        known = self._manifests | changed
        self._manifests = {file: known[file] for file in stamps}
        self._pods = {}
        for manifest in self._manifests.values():
            for pod in manifest.pods:
                self._pods.setdefault((pod.namespace, pod.name), []).append(pod)

    def _stamps(self) -> Iterator[tuple[str, Stamp]]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIXES):
                    yield entry.name, _stamp(entry)

    def _read(self, file: str, stamp: Stamp) -> _Manifest:
        try:
            return _Manifest(stamp, pods=tuple(_pods_in(self.path / file)))
        except Exception as error:  # PyYAML raises many kinds of errors; one bad file must not hide the others
            problem = _sentence(error)
        self._log.warning("manifest.ignored", file=str(self.path / file), problem=problem)
        return _Manifest(stamp, problem=problem)

    def _not_found(self, namespace: str, name: str, uid: str | None, others: list[Pod], broken: list[str]) -> str:
        message = f"no Pod {namespace}/{name} in {self.path}"
        if others:
            found = ", ".join(str(pod.uid) for pod in others)
            message += f" has UID {uid}; the one there has {found}"
        if broken:
            message += f"; not readable: {', '.join(broken)}"
        return message


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        status = entry.stat()
    except OSError:  # a dangling link, or deleted a moment ago: reading the file will report it
        return _GONE
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _pods_in(path: Path) -> Iterator[Pod]:
    text = _text_of(path)
    documents = [json.loads(text)] if path.suffix == ".json" else yaml.load_all(text, _YamlLoader)
    for document in documents:
        if document is not None:  # an empty document between two ---
            yield from _pods_of(document)


def _text_of(path: Path) -> str:
    """A file's text. Raises ValueError unless it is a regular file of a manifest's size: others may never end."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
    return raw.decode("utf-8")


def _pods_of(document: Any) -> Iterator[Pod]:
    if not isinstance(document, dict):
        raise ValueError(f"a {type(document).__name__} is not a Kubernetes object")
    if document.get("kind") == "Pod":
        yield Pod.model_validate(document)
    elif document.get("kind") == "List":
        for item in document.get("items") or ():
            yield from _pods_of(item)


def _sentence(error: Exception) -> str:
    """An error's message in one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{_place(each['loc'])}: {each['msg']}" for each in error.errors())
    return " ".join(str(error).split()) or type(error).__name__


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))
