"""The host's CNI configuration directory: which file is ours to edit, and how it is exchanged for another."""

import os
from contextlib import suppress
from typing import NamedTuple

import structlog

from installer.host import chain, files
from installer.host.chain import Conf, Document
from installer.host.files import FileRefused, Found
from installer.settings import Chain

log = structlog.get_logger("chain")


class NoConf(FileRefused):
    """There is no configuration yet that the plugin could be put into."""


class Edit(NamedTuple):
    """A file that was not as it should be: its plugins, what was wrong, and whose file it was."""

    file: str
    plugins: tuple[str, ...]
    fault: str
    uid: int


class Place(NamedTuple):
    """Where our entry belongs, what is wrong with it there ("": nothing), and what else is to be known."""

    file: str
    fault: str
    remarks: tuple[str, ...]


class _Choice(NamedTuple):
    """The configuration that counts, files that no runtime would take, and a setting that has no effect ("": none)."""

    conf: Conf
    invalid: tuple[str, ...]
    not_first: str


class _Listing(NamedTuple):
    """What a runtime finds in the directory; `unreadable` says why for what it may read and we may not."""

    contents: dict[str, bytes]
    unreadable: dict[str, FileRefused]


class ConfDirectory:
    """Puts our entry into the configuration that counts, and takes it out again."""

    def __init__(self, settings: Chain, entry: Document) -> None:
        self._settings = settings
        self._entry = entry
        self.path = settings.mounted_cni_net_dir
        self._reported: set[str] = set()

    def enter(self) -> Edit | None:
        """Make the directory say what it should; None when it does. Raises NoConf, FileRefused."""
        if not self._settings.chained_cni_plugin:
            return self._write_own()
        conf, invalid, not_first = self._choice()
        for problem in invalid:
            self._warn_once("chain.skipped", problem)
        if not_first:
            self._warn_once("chain.not_first", not_first)
        if problem := chain.unsupported(conf):
            raise FileRefused(f"{self.path}: {problem}; have the primary plugin write one of these")
        fault = chain.fault(conf, self._entry)
        if not fault:
            return self._finish_wrapping(conf)
        for kind in chain.replaced_types(conf):
            log.warning("chain.replaced", file=conf.file, plugin=kind, reason="sidestep takes its place")
        if chain.is_raised(conf):
            log.warning("chain.version_raised", file=conf.file, to=chain.OLDEST_VERSION, reason="older have no chains")
        uid = self._exchange(conf, chain.with_plugin(conf, self._entry))
        return Edit(conf.file, tuple(conf.types), fault, uid)

    def leave(self) -> list[str]:
        """Take our entry out of every file; returns their names. Twice is fine. Raises FileRefused."""
        ours = self._ours()
        for conf in ours:
            self._leave(conf)
        return [conf.file for conf in ours]

    def examine(self) -> Place:
        """How it is with our entry; nothing is changed. Raises NoConf, FileRefused."""
        if not self._settings.chained_cni_plugin:
            wanted = self._own()
            found = files.read(self.path / wanted.file)
            return Place(wanted.file, _own_fault(found, self._own_form(wanted)), ())
        conf, invalid, not_first = self._choice()
        remarks = (*invalid, *([not_first] if not_first else ()))
        return Place(conf.file, chain.unsupported(conf) or chain.fault(conf, self._entry), remarks)

    def holding(self) -> list[str]:
        """The files that have our entry, right or wrong. Raises FileRefused."""
        return [conf.file for conf in self._ours()]

    def present(self) -> list[str]:
        """Which plugins the file has that a runtime takes, for messages; empty when there is none."""
        conf, _ = chain.first_valid(self._listing().contents)
        return [f"{conf.file}:", *conf.types] if conf else []

    def _ours(self) -> list[Conf]:
        """The configurations that we are in."""
        found = []
        for file, content in sorted(self._listing().contents.items()):
            with suppress(chain.InvalidConf):
                found.append(chain.parse(file, content))
        return [conf for conf in found if chain.has_plugin(conf)]

    def _leave(self, conf: Conf) -> None:
        rest = chain.without_plugin(conf)
        if rest and rest.file != conf.file and files.read(self.path / rest.file):
            # made from a file that is there: a crash has left it, or the primary plugin has written it again
            rest = None if self._single(rest.file) else chain.taken_out(conf)
        if rest is None:
            files.remove(self.path / conf.file)
        else:
            self._exchange(conf, rest)

    def _write_own(self) -> Edit | None:
        conf = self._own()
        wanted = self._own_form(conf)
        found = files.read(self.path / conf.file)
        fault = _own_fault(found, wanted)
        if not fault:
            return None
        files.replace(self.path / conf.file, wanted)
        return Edit(conf.file, (), fault, found.uid if found else 0)

    def _own(self) -> Conf:
        return chain.standalone(self._settings.cni_conf_name or chain.STANDALONE_FILE, self._entry)

    def _own_form(self, conf: Conf) -> Found:
        return Found(conf.render(), 0o640 if self._settings.cni_conf_group_read else 0o600, 0, 0)

    def _choice(self) -> _Choice:
        """The configuration that a runtime takes, or the one that the settings name."""
        listing = self._listing()
        name = self._settings.cni_conf_name
        wanted = chain.siblings(name) if name else sorted(listing.contents)
        conf, problems = chain.first_valid(
            {file: listing.contents[file] for file in wanted if file in listing.contents}
        )
        for file, problem in sorted(listing.unreadable.items()):
            if (not name or file in wanted) and (conf is None or file < conf.file):
                # the runtime goes by it, so to edit a later one would be in vain
                raise problem
        if conf is None:
            for invalid in problems:
                self._warn_once("chain.skipped", str(invalid))
            raise NoConf(
                f"{self.path / name if name else self.path}: no valid CNI configuration yet; waiting for the primary "
                "plugin to write one"
            )
        first, _ = chain.first_valid(listing.contents)
        not_first = first is not None and conf.file != first.file
        said = f"CNI_CONF_NAME is {name}, but the runtime takes {first.file}" if first and not_first else ""
        return _Choice(conf, tuple(map(str, problems)), said)

    def _warn_once(self, event: str, problem: str) -> None:
        if problem not in self._reported:
            self._reported.add(problem)
            log.warning(event, directory=str(self.path), problem=problem)

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

    def _exchange(self, old: Conf, new: Conf) -> int:
        """One file for another, whose mode and owner stay; at every instant the network is there. Returns the owner.

        While both are there a runtime takes the one that comes first by name, a.conf before a.conflist before a.json,
        and all are whole. What a crash leaves in between is finished at the next start.
        """
        before = files.read(self.path / old.file)
        if before is None:
            raise FileRefused(f"{self.path / old.file} has just been removed by somebody else")
        if new.file != old.file and self._is_foreign(new):
            raise FileRefused(f"{self.path / new.file} is in the way of {old.file}; remove one of the two")
        files.replace(self.path / new.file, before._replace(content=new.render()))
        if new.file != old.file:
            files.remove(self.path / old.file)
        return before.uid

    def _finish_wrapping(self, conf: Conf) -> Edit | None:
        """Remove the single plugin's file that a crash has left beside the list made from it and behind it."""
        before = chain.without_plugin(conf)
        if before is None or before.file == conf.file or self._single(before.file) != before:
            return None
        uid = (files.read(self.path / before.file) or Found(b"", 0, 0, 0)).uid
        files.remove(self.path / before.file)
        return Edit(before.file, tuple(before.types), "left beside its list", uid)

    def _is_foreign(self, new: Conf) -> bool:
        """Whether the list that would be replaced is somebody else's, rather than what we have made of the file."""
        there = files.read(self.path / new.file)
        if there is None or not there.content.strip():  # an empty file is what a power loss has left of one
            return False
        try:
            return chain.wrapped_from(chain.parse(new.file, there.content)) is None
        except chain.InvalidConf:
            return True

    def _single(self, file: str) -> Conf | None:
        """A file that a runtime takes for a single plugin other than us; None when it is none."""
        found = files.read(self.path / file)
        try:
            conf = chain.parse(file, found.content) if found else None
        except chain.InvalidConf:
            return None
        return conf if conf and not chain.has_plugin(conf) else None


def _own_fault(found: Found | None, wanted: Found) -> str:
    """What is wrong with a network of our own; empty when nothing is."""
    if found is None:
        return "file missing"
    return "" if found == wanted else "file changed"
