"""Finds configuration files in the host's CNI directory: the primary network's, and the one that a runtime takes."""

import os
from contextlib import suppress
from typing import NamedTuple

import structlog

from installer.host import chain, files
from installer.host.chain import Conf
from installer.host.files import FileRefused
from installer.settings import Chain

log = structlog.get_logger("chain")


class NoConf(FileRefused):
    """The directory has no valid configuration yet that the plugin could be added to."""


class Choice(NamedTuple):
    """The primary configuration, with what the log should say about the directory.

    `invalid` has a message for each file before it that no runtime would take. `not_first` says that the runtime takes
    another file than the one that CNI_CONF_NAME names; "" if it does not.
    """

    conf: Conf
    invalid: tuple[str, ...]
    not_first: str


class _Listing(NamedTuple):
    """Configuration files by name: their `contents`, and why we can't read those that are `unreadable`."""

    contents: dict[str, bytes]
    unreadable: dict[str, FileRefused]

    def foreign(self) -> dict[str, bytes]:
        """The contents without the lists that chain.owned() made."""
        return {file: content for file, content in self.contents.items() if not _is_owned(file, content)}


def _read(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Those of the files that runtimes read: the chosen one may have any ending."""
    return {file: content for file, content in contents.items() if chain.is_read(file)}


class Candidates:
    """Reads the directory; never changes it."""

    def __init__(self, settings: Chain) -> None:
        self._settings = settings
        self.path = settings.mounted_cni_net_dir
        self._reported: set[str] = set()

    def every(self) -> list[Conf]:
        """All valid configurations, sorted by file name. Raises FileRefused if the directory can't be read."""
        found = []
        for file, content in sorted(self._listing().contents.items()):
            with suppress(chain.InvalidConf):
                found.append(chain.parse_list(file, content))
        return found

    def taken(self) -> Conf | None:
        """The configuration that a runtime takes; None if there is none. Raises FileRefused."""
        return chain.first_valid(_read(self._listing().contents))[0]

    def primary(self) -> Choice:
        """The primary network's configuration: the one that the settings name, else the first that is not our own list.

        Raises NoConf if there is none yet, FileRefused if a file that a runtime may take instead can't be read.
        """
        listing = self._listing()
        foreign = listing.foreign()
        name = self._settings.cni_conf_name
        wanted = chain.siblings(name) if name else sorted(filter(self._may_be_primary, foreign))
        conf, problems = chain.first_valid({file: foreign[file] for file in wanted if file in foreign})
        for file, problem in sorted(listing.unreadable.items()):
            if (not name or file in wanted) and (conf is None or file < conf.file):
                # the runtime may take this file, so editing a later one would have no effect
                raise problem
        if conf is None:
            for invalid in problems:
                self.warn_once("chain.skipped", str(invalid))
            raise NoConf(
                f"{self.path / name if name else self.path}: no valid CNI configuration yet; waiting for the primary "
                f"plugin to write one{self._kept(listing)}"
            )
        first, _ = chain.first_valid(_read(foreign))
        is_other = name and first and first.file != conf.file
        said = f"CNI_CONF_NAME is {name}, but the runtime takes {first.file}" if first and is_other else ""
        return Choice(conf, tuple(map(str, problems)), said)

    def ahead(self) -> Conf | None:
        """Another owner's configuration whose file comes before our own list, or has its name; else None.

        Raises FileRefused.
        """
        foreign = _read(self._listing().foreign())
        own = self._settings.istio_owned_cni_config_filename
        return chain.first_valid({file: content for file, content in foreign.items() if file <= own})[0]

    def warn_once(self, event: str, problem: str) -> None:
        """Log a problem of the directory, once."""
        if problem not in self._reported:
            self._reported.add(problem)
            log.warning(event, directory=str(self.path), problem=problem)

    def _may_be_primary(self, file: str) -> bool:
        """Whether a file may be copied into our own list. A file before the list may not.

        Such a file is multus': it calls the next file in the directory, which is our list.
        """
        settings = self._settings
        return not settings.istio_owned_cni_config or file > settings.istio_owned_cni_config_filename

    def _kept(self, listing: _Listing) -> str:
        own = self._settings.istio_owned_cni_config_filename
        if self._settings.istio_owned_cni_config and own in listing.contents:
            return f"; {own} stays as it was"
        return ""

    def _listing(self) -> _Listing:
        listing = _Listing({}, {})
        with files.explained(self.path), os.scandir(self.path) as entries:
            names = [each.name for each in entries if not each.is_dir(follow_symlinks=False)]
        for name in names:
            if not (chain.is_read(name) or name == self._settings.cni_conf_name) or files.is_temporary(name):
                continue
            try:
                if file := files.read(self.path / name):
                    listing.contents[name] = file.content
            except FileRefused as problem:
                listing.unreadable[name] = problem
        return listing


def _is_owned(file: str, content: bytes) -> bool:
    try:
        return chain.is_owned(chain.parse_list(file, content))
    except chain.InvalidConf:
        return False
