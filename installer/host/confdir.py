"""Edits the host's CNI configuration directory: chooses the file, and replaces it so that a runtime never misses it."""

from typing import NamedTuple

import structlog

from installer.host import chain, files
from installer.host.candidates import Candidates, NoConf
from installer.host.chain import PLUGIN, Conf, Document
from installer.host.files import FileRefused, Found
from installer.settings import Chain

log = structlog.get_logger("chain")

_CHANGED = "file changed"


class Edit(NamedTuple):
    """A file that was corrected: the plugins in it, what was wrong, and the uid of its owner."""

    file: str
    plugins: tuple[str, ...]
    fault: str
    uid: int


class ChainPlace(NamedTuple):
    """The file that should have our entry, what is wrong with the entry ("": nothing), and remarks on the directory."""

    file: str
    fault: str
    remarks: tuple[str, ...]


class ConfDirectory:
    """Puts our entry into the right configuration file, and takes it out again."""

    def __init__(self, settings: Chain, entry: Document) -> None:
        self._settings = settings
        self._entry = entry
        self.path = settings.mounted_cni_net_dir
        self._there = Candidates(settings)

    def enter(self) -> list[Edit]:
        """Put our entry where the settings say. Returns the corrections, none if all was right.

        Raises NoConf if there is no configuration to edit yet, FileRefused if a file can't be read or written.
        """
        if not self._settings.chained_cni_plugin:
            edits = self._write(self._standalone(), _CHANGED)
        elif self._settings.istio_owned_cni_config:
            edits = self._enter_owned()
        else:
            edits = self._enter_primary()
        self._remove_outdated()  # last: until now a runtime may be using such a file
        return edits

    def leave(self) -> list[str]:
        """Take our entry out of every file; returns the files' names. May be called again. Raises FileRefused."""
        ours = self._ours()
        for conf in ours:
            self._leave(conf)
        return [conf.file for conf in ours]

    def examine(self) -> ChainPlace:
        """Report on our entry without changing anything. Raises NoConf, FileRefused."""
        if not self._settings.chained_cni_plugin:
            return ChainPlace(self._standalone().file, self._fault(self._standalone(), _CHANGED), ())
        if self._settings.istio_owned_cni_config:
            return self._examine_owned()
        conf, invalid, not_first = self._there.primary()
        remarks = (*invalid, *([not_first] if not_first else ()))
        return self._place_in(conf, remarks)

    def replaced(self) -> list[tuple[str, Document]]:
        """The entries of plugins that sidestep replaces, each with its file. Raises FileRefused."""
        there = self._there.every()
        return [(conf.file, entry) for conf in there for entry in conf.plugins if entry["type"] in chain.REPLACED]

    def holding(self) -> list[str]:
        """The names of the files that have an entry of ours, right or wrong. Raises FileRefused."""
        return [conf.file for conf in self._ours()]

    def present(self) -> list[str]:
        """For messages: the name of the file that a runtime takes, then its plugins; empty if there is none.

        Raises FileRefused.
        """
        conf = self._there.taken()
        return [f"{conf.file}:", *conf.types] if conf else []

    def _ours(self) -> list[Conf]:
        """The configurations that have an entry of ours."""
        return [conf for conf in self._there.every() if chain.has_plugin(conf)]

    def _leave(self, conf: Conf) -> None:
        rest = chain.without_plugin(conf)
        if rest and rest.file != conf.file and files.read(self.path / rest.file):
            # the single plugin's file is there too: a crash has left it, or the primary plugin has written it again
            rest = None if self._single(rest.file) else chain.taken_out(conf)
        if rest is None:
            files.remove(self.path / conf.file)
        else:
            self._exchange(conf, rest)

    def _enter_primary(self) -> list[Edit]:
        conf, invalid, not_first = self._there.primary()
        self._say_skipped(invalid)
        if not_first:
            self._there.warn_once("chain.not_first", not_first)
        return self._put_into(conf)

    def _enter_owned(self) -> list[Edit]:
        """Write our own list, which comes first and copies the primary configuration as it is now.

        If another file comes before our list, the runtime takes that file. Then that file gets our entry too.
        """
        edits = []
        ahead = self._there.ahead()
        if ahead:
            self._there.warn_once("chain.not_first", self._passed_over(ahead))
            edits = self._put_into(ahead)
            if ahead.file == self._settings.istio_owned_cni_config_filename:
                return edits
        try:
            primary, invalid, _ = self._there.primary()
        except NoConf:
            if ahead:
                return edits
            raise
        self._say_skipped(invalid)
        self._require_supported(primary)
        return edits + self._write(self._owned(primary), _not_as(primary))

    def _examine_owned(self) -> ChainPlace:
        if ahead := self._there.ahead():
            return self._place_in(ahead, (self._passed_over(ahead),))
        primary, invalid, _ = self._there.primary()
        own = self._owned(primary)
        return ChainPlace(own.file, chain.unsupported(primary) or self._fault(own, _not_as(primary)), invalid)

    def _place_in(self, conf: Conf, remarks: tuple[str, ...]) -> ChainPlace:
        return ChainPlace(conf.file, chain.unsupported(conf) or chain.fault_of_list(conf, self._entry), remarks)

    def _put_into(self, conf: Conf) -> list[Edit]:
        self._require_supported(conf)
        fault = chain.fault_of_list(conf, self._entry)
        if not fault:
            return self._finish_wrapping(conf)
        for kind in chain.replaced_types(conf):
            log.warning("chain.replaced", file=conf.file, plugin=kind, reason="sidestep takes its place")
        if chain.is_raised(conf):
            log.warning(
                "chain.version_raised", file=conf.file, to=chain.OLDEST_VERSION, reason="older versions have no chains"
            )
        uid = self._exchange(conf, chain.with_plugin(conf, self._entry))
        return [Edit(conf.file, tuple(conf.types), fault, uid)]

    def _require_supported(self, conf: Conf) -> None:
        if problem := chain.unsupported(conf):
            raise FileRefused(f"{self.path}: {problem}; make the primary plugin write one of these")

    def _say_skipped(self, invalid: tuple[str, ...]) -> None:
        for problem in invalid:
            self._there.warn_once("chain.skipped", problem)

    def _passed_over(self, ahead: Conf) -> str:
        name = self._settings.istio_owned_cni_config_filename
        if ahead.file == name:
            return f"ISTIO_OWNED_CNI_CONFIG_FILENAME is {name}, a file of another installer; choose another name"
        return f"the runtime takes {ahead.file}: it sorts before ISTIO_OWNED_CNI_CONFIG_FILENAME, which is {name}"

    def _remove_outdated(self) -> None:
        """Remove lists of our own that were made with other settings: nothing keeps them up to date any more."""
        settings = self._settings
        current = settings.chained_cni_plugin and settings.istio_owned_cni_config
        for conf in self._there.every():
            if chain.is_owned(conf) and not (current and conf.file == settings.istio_owned_cni_config_filename):
                files.remove(self.path / conf.file)
                log.info("chain.outdated", file=conf.file, reason="removed: it was made with other settings")

    def _write(self, conf: Conf, changed: str) -> list[Edit]:
        """Write a file of our own if it differs; `changed` is the fault to report if the content differs."""
        fault = self._fault(conf, changed)
        if not fault:
            return []
        found = files.read(self.path / conf.file)
        files.replace(self.path / conf.file, self._own_form(conf))
        others = tuple(kind for kind in conf.types if kind != PLUGIN)
        return [Edit(conf.file, others, fault, found.uid if found else 0)]

    def _fault(self, conf: Conf, changed: str) -> str:
        """What is wrong with a file of our own; empty if nothing is."""
        found = files.read(self.path / conf.file)
        if found is None:
            return "file missing"
        return "" if found == self._own_form(conf) else changed

    def _standalone(self) -> Conf:
        return chain.standalone(self._settings.cni_conf_name or chain.STANDALONE_FILE, self._entry)

    def _owned(self, primary: Conf) -> Conf:
        return chain.owned(primary, self._entry, self._settings.istio_owned_cni_config_filename)

    def _own_form(self, conf: Conf) -> Found:
        return Found(conf.render(), 0o640 if self._settings.cni_conf_group_read else 0o600, 0, 0)

    def _exchange(self, old: Conf, new: Conf) -> int:
        """Replace one file by another, which keeps mode and owner. Returns the uid of the owner. Raises FileRefused.

        The network is there at every instant. While both files are there, a runtime takes the one that sorts first
        (a.conf before a.conflist before a.json), and both are complete. After a crash in between, the next start
        finishes the work.
        """
        before = files.read(self.path / old.file)
        if before is None:
            raise FileRefused(f"{self.path / old.file} was removed a moment ago by another program")
        if new.file != old.file and self._is_foreign(new):
            raise FileRefused(f"{self.path / new.file} is in the way of {old.file}; remove one of the two")
        files.replace(self.path / new.file, before._replace(content=new.render()))
        if new.file != old.file:
            files.remove(self.path / old.file)
        return before.uid

    def _finish_wrapping(self, conf: Conf) -> list[Edit]:
        """Remove the single plugin's file if a crash has left it beside the list that was made from it."""
        before = chain.without_plugin(conf)
        if before is None or before.file == conf.file or self._single(before.file) != before:
            return []
        uid = (files.read(self.path / before.file) or Found(b"", 0, 0, 0)).uid
        files.remove(self.path / before.file)
        return [Edit(before.file, tuple(before.types), "left beside its list", uid)]

    def _is_foreign(self, new: Conf) -> bool:
        """Whether the list that would be replaced is another owner's, and not one that we made from a single plugin."""
        there = files.read(self.path / new.file)
        if there is None or not there.content.strip():  # a power loss may leave an empty file
            return False
        try:
            return chain.wrapped_from(chain.parse_list(new.file, there.content)) is None
        except chain.InvalidConf:
            return True

    def _single(self, file: str) -> Conf | None:
        """The configuration in a file, if it is valid and has no entry of ours; else None."""
        found = files.read(self.path / file)
        try:
            conf = chain.parse_list(file, found.content) if found else None
        except chain.InvalidConf:
            return None
        return conf if conf and not chain.has_plugin(conf) else None


def _not_as(primary: Conf) -> str:
    return f"differs from {primary.file}"
