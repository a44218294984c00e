"""The host's CNI configuration directory: which file is ours to edit, and how it is exchanged for another."""

import structlog

from installer.host import chain, files
from installer.host.chain import Conf, Document
from installer.host.files import FileRefused, Found
from installer.settings import Chain

log = structlog.get_logger("chain")


class NoConf(FileRefused):
    """There is no configuration yet that the plugin could be put into."""


class ConfDirectory:
    """Puts our entry into the configuration that counts, and takes it out again."""

    def __init__(self, settings: Chain, entry: Document) -> None:
        self._settings = settings
        self._entry = entry
        self.path = settings.mounted_cni_net_dir
        self._reported: set[str] = set()

    def enter(self) -> bool:
        """Make the directory say what it should; False when it does. Raises NoConf, FileRefused."""
        if not self._settings.chained_cni_plugin:
            return self._write_own()
        conf = self._chosen()
        wanted = chain.with_plugin(conf, self._entry)
        if wanted == conf:
            return False
        for kind in chain.replaced_types(conf):
            log.warning("chain.replaced", file=conf.file, plugin=kind, reason="sidestep takes its place")
        self._exchange(conf, wanted)
        return True

    def leave(self) -> list[str]:
        """Take our entry out of every file; returns their names. Twice is fine. Raises FileRefused."""
        changed = []
        for file, content in sorted(self._contents().items()):
            try:
                conf = chain.parse(file, content)
            except chain.InvalidConf:
                continue
            if not chain.has_plugin(conf):
                continue
            rest = chain.without_plugin(conf)
            if rest is None:
                files.remove(self.path / file)
            else:
                self._exchange(conf, rest)
            changed.append(file)
        return changed

    def present(self) -> list[str]:
        """Which plugins the file has that a runtime takes, for messages; empty when there is none."""
        conf, _ = chain.first_valid(self._contents())
        return [f"{conf.file}:", *conf.types] if conf else []

    def _write_own(self) -> bool:
        file = self._settings.cni_conf_name or chain.STANDALONE_FILE
        mode = 0o640 if self._settings.cni_conf_group_read else 0o600
        wanted = Found(chain.standalone(file, self._entry).render(), mode, 0, 0)
        if files.read(self.path / file) == wanted:
            return False
        files.replace(self.path / file, wanted)
        return True

    def _chosen(self) -> Conf:
        contents = self._contents()
        if name := self._settings.cni_conf_name:
            contents = {file: contents[file] for file in chain.siblings(name) if file in contents}
        conf, problems = chain.first_valid(contents)
        for problem in problems:
            if str(problem) not in self._reported:
                self._reported.add(str(problem))
                log.warning("chain.skipped", directory=str(self.path), problem=str(problem))
        if conf is None:
            raise NoConf(
                f"{self.path / name if name else self.path}: no valid CNI configuration yet; waiting for the primary "
                "plugin to write one"
            )
        return conf

    def _contents(self) -> dict[str, bytes]:
        found = {}
        with files.explained(self.path):
            names = [path.name for path in self.path.iterdir() if path.name.endswith(chain.SUFFIXES)]
        for name in names:
            if not files.is_temporary(name) and (file := self._read(name)):
                found[name] = file.content
        return found

    def _read(self, name: str) -> Found | None:
        try:
            return files.read(self.path / name)
        except FileRefused as problem:
            if str(problem) not in self._reported:
                self._reported.add(str(problem))
                log.warning("chain.skipped", directory=str(self.path), problem=str(problem))
            return None

    def _exchange(self, old: Conf, new: Conf) -> None:
        """One file for another, whose mode and owner stay; at every instant the network is there.

        While both are there a runtime takes a.conf before a.conflist, and both are whole. What a crash leaves in
        between is done again at the next start.
        """
        before = files.read(self.path / old.file)
        if before is None:
            raise FileRefused(f"{self.path / old.file} has just been removed by somebody else")
        if new.file != old.file and self._is_foreign(new):
            raise FileRefused(f"{self.path / new.file} is in the way of {old.file}; remove one of the two")
        files.replace(self.path / new.file, before._replace(content=new.render()))
        if new.file != old.file:
            files.remove(self.path / old.file)

    def _is_foreign(self, new: Conf) -> bool:
        """Whether the file that `new` would replace is somebody else's, rather than what a crash of ours has left."""
        there = files.read(self.path / new.file)
        if there is None or there.content == new.render():
            return False
        try:
            return not chain.was_wrapped(chain.parse(new.file, there.content))
        except chain.InvalidConf:
            return True
