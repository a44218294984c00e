"""What the host's CNI configuration directory has: the primary plugin's file, and whatever a runtime takes instead."""

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
    """There is no configuration yet that the plugin could be put into."""


class Choice(NamedTuple):
    """The primary configuration, files that no runtime would take, and a setting that has no effect ("": none)."""

    conf: Conf
    invalid: tuple[str, ...]
    not_first: str


class _Listing(NamedTuple):
    """What a runtime finds in the directory; `unreadable` says why for what it may read and we may not."""

    contents: dict[str, bytes]
    unreadable: dict[str, FileRefused]

    def foreign(self) -> dict[str, bytes]:
        """Without the lists that are ours as a whole."""
        return {file: content for file, content in self.contents.items() if not _is_owned(file, content)}


class Candidates:
    """The directory as it is; nothing here changes it."""

    def __init__(self, settings: Chain) -> None:
        self._settings = settings
        self.path = settings.mounted_cni_net_dir
        self._reported: set[str] = set()

    def every(self) -> list[Conf]:
        """All that are valid, by name. Raises FileRefused."""
        found = []
        for file, content in sorted(self._listing().contents.items()):
            with suppress(chain.InvalidConf):
                found.append(chain.parse_list(file, content))
        return found

    def taken(self) -> Conf | None:
        """The one that a runtime takes. Raises FileRefused."""
        return chain.first_valid(self._listing().contents)[0]

    def primary(self) -> Choice:
        """The one that the settings name, or the first that is not ours as a whole. Raises NoConf, FileRefused."""
        listing = self._listing()
        foreign = listing.foreign()
        name = self._settings.cni_conf_name
        wanted = chain.siblings(name) if name else sorted(filter(self._may_be_primary, foreign))
        conf, problems = chain.first_valid({file: foreign[file] for file in wanted if file in foreign})
        for file, problem in sorted(listing.unreadable.items()):
            if (not name or file in wanted) and (conf is None or file < conf.file):
                # the runtime goes by it, so to edit a later one would be in vain
                raise problem
        if conf is None:
            for invalid in problems:
                self.warn_once("chain.skipped", str(invalid))
            raise NoConf(
                f"{self.path / name if name else self.path}: no valid CNI configuration yet; waiting for the primary "
                f"plugin to write one{self._kept(listing)}"
            )
        first, _ = chain.first_valid(foreign)
        is_other = name and first and first.file != conf.file
        said = f"CNI_CONF_NAME is {name}, but the runtime takes {first.file}" if first and is_other else ""
        return Choice(conf, tuple(map(str, problems)), said)

    def ahead(self) -> Conf | None:
        """Somebody else's that comes before the list of our own, or has its name. Raises FileRefused."""
        foreign = self._listing().foreign()
        own = self._settings.istio_owned_cni_config_filename
        return chain.first_valid({file: content for file, content in foreign.items() if file <= own})[0]

    def warn_once(self, event: str, problem: str) -> None:
        """Say what is wrong with the directory, if it has not been said."""
        if problem not in self._reported:
            self._reported.add(problem)
            log.warning(event, directory=str(self.path), problem=problem)

    def _may_be_primary(self, file: str) -> bool:
        """What comes before the list of our own is not to be in it: multus calls the next one, which is ours."""
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
            if not name.endswith(chain.SUFFIXES) or files.is_temporary(name):
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
