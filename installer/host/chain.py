"""The plugin's place in a CNI configuration: pure functions from documents to documents.

A runtime takes the first valid file of its directory, sorted by name. The file is a list of plugins (.conflist) or a
single plugin (.conf, .json). A single plugin has no place for a second one, so it has to become a list.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bpf.errors import SidestepError
from installer.settings import Node

PLUGIN = "sidestep-cni"
# plugins that sidestep replaces: two capturing plugins in one chain would both act
REPLACED = ("istio-cni",)
# the network that Istio's injector asks multus to add (annotation k8s.v1.cni.cncf.io/networks: default/istio-cni)
STANDALONE_NETWORK = "istio-cni"
STANDALONE_FILE = "YYY-sidestep-cni.conf"
LIST_SUFFIX = ".conflist"
SUFFIXES = (".conf", LIST_SUFFIX, ".json")
# versions of the CNI spec that the plugin speaks. Older versions lack the previous result in the form that chains
# need, except 0.3.0: it is 0.3.1 under another name, and Weave and kube-router still write it
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
OLDEST_VERSION = VERSIONS[0]
# key of our entry in a list that was a single plugin before: the plugin's file and cniVersion ("" for none)
_WRAPPED = "wrapped"
# key of our entry in a list whose cniVersion was older than OLDEST_VERSION: that cniVersion ("" for none)
_RAISED = "raised_from"
# key of our entry in a list that owned() made: the file of the primary configuration that the list copies
_MADE_FROM = "made_from"

Document = dict[str, Any]


class InvalidConf(SidestepError):
    """A file that a runtime would not take as a CNI configuration."""


@dataclass(frozen=True)
class Conf:
    """A configuration: the name of its file, and the parsed content."""

    file: str
    document: Document

    @property
    def is_list(self) -> bool:
        """Whether it is a list of plugins rather than a single one."""
        return _is_list(self.file, self.document)

    @property
    def plugins(self) -> list[Document]:
        """The plugins in order."""
        return list(self.document["plugins"]) if self.is_list else [self.document]

    @property
    def types(self) -> list[str]:
        """The types of the plugins in order."""
        return [str(plugin.get("type")) for plugin in self.plugins]

    def render(self) -> bytes:
        """The file's content. ASCII, because a string may hold half a surrogate pair, which UTF-8 can't encode."""
        return (json.dumps(self.document, indent=2, allow_nan=False) + "\n").encode("ascii")


def parse_list(file: str, content: bytes) -> Conf:
    """Parse a file as a runtime does. Raises InvalidConf if a runtime would not take it."""
    document = _decoded(file, content)
    if not isinstance(document, dict):
        raise InvalidConf(f"{file} is not a JSON object")
    if not isinstance(document.get("cniVersion", ""), str):
        raise InvalidConf(f'{file} has a "cniVersion" that is not a string')
    if not _is_list(file, document):
        if not _is_plugin(document):
            raise InvalidConf(f'{file} has no "type"; a list of plugins must be in a {LIST_SUFFIX} file')
        if not isinstance(document.get("name", ""), str):
            raise InvalidConf(f'{file} has a "name" that is not a string')
        return Conf(file, document)
    if not isinstance(document.get("name"), str) or not document["name"]:
        raise InvalidConf(f'{file} has no "name"')
    plugins = document.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise InvalidConf(f'{file} has no "plugins"')
    if not all(_is_plugin(plugin) for plugin in plugins):
        raise InvalidConf(f'{file} has a plugin without "type"')
    return Conf(file, document)


def entry_of(node: Node) -> Document:
    """Our plugin's object in the list of plugins."""
    return {
        "type": PLUGIN,
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "cgroupPath": True},
        "cni_agent_run_dir": str(node.cni_agent_run_dir),
        "agent_timeout_seconds": node.agent_timeout_seconds,
        "pod_namespace": node.pod_namespace,
        "exclude_namespaces": list(node.exclude_namespaces),
        **({"ambient_enabled": True} if node.ambient_enabled else {}),
    }


def standalone(file: str, entry: Document) -> Conf:
    """A network with only our plugin, which multus adds to pods beside their main network."""
    return Conf(file, {"cniVersion": OLDEST_VERSION, "name": STANDALONE_NETWORK, **entry})


def owned(primary: Conf, entry: Document, file: str) -> Conf:
    """Our own list, named `file`: the network name, version and plugins of the primary configuration, and our entry."""
    document = with_plugin(primary, entry).document
    return Conf(file, {**document, "plugins": [*_others(document["plugins"]), {**entry, _MADE_FROM: primary.file}]})


def is_owned(conf: Conf) -> bool:
    """Whether owned() made the configuration."""
    return conf.is_list and isinstance(_kept(conf, _MADE_FROM), str)


def with_plugin(conf: Conf, entry: Document) -> Conf:
    """The configuration with exactly one entry of ours, the last one; entries of REPLACED plugins are dropped.

    A single plugin becomes a list with the same network name. A cniVersion older than OLDEST_VERSION is replaced by it.
    """
    if conf.is_list:
        return _inserted(conf, entry)
    version = str(conf.document.get("cniVersion", ""))
    plugin = {key: value for key, value in conf.document.items() if key not in ("cniVersion", "name")}
    document: Document = {
        "cniVersion": OLDEST_VERSION if _is_old(version) else version,
        "name": _network(conf),
        "plugins": [plugin, {**entry, _WRAPPED: {"file": conf.file, "cniVersion": version}}],
    }
    return Conf(list_file(conf.file), document)


def without_plugin(conf: Conf) -> Conf | None:
    """Undo with_plugin(), also the change from a single plugin to a list. REPLACED plugins do not come back.

    None if no plugin is left, or if owned() made the configuration.
    """
    if is_owned(conf):
        return None
    left = taken_out(conf)
    marker = wrapped_from(conf)
    if left is None or marker is None or len(left.plugins) > 1:
        return left
    head = {"cniVersion": marker["cniVersion"]} if marker["cniVersion"] else {}
    name = {} if conf.document["name"] == marker["file"] else {"name": conf.document["name"]}
    return Conf(marker["file"], {**head, **name, **left.plugins[0]})


def taken_out(conf: Conf) -> Conf | None:
    """The configuration without our entry, in the same file; None if no plugin is left."""
    if not conf.is_list:
        return None if _is(conf.document, PLUGIN) else conf
    others = [plugin for plugin in conf.plugins if not _is(plugin, PLUGIN)]
    if not others:
        return None
    document = {**conf.document, "plugins": others}
    before = _kept(conf, _RAISED)
    if isinstance(before, str) and document.get("cniVersion") == OLDEST_VERSION:
        document["cniVersion"] = before
        if not before:
            del document["cniVersion"]
    return Conf(conf.file, document)


def unsupported(conf: Conf) -> str:
    """Why the plugin can't work in this configuration; empty if it can.

    If it can't, it must not be added: every pod of the network would fail, even pods outside the mesh.
    """
    spoken = _versions(conf)
    if is_raised(conf) or spoken & set(VERSIONS):
        return ""
    return f"{conf.file} has cniVersion {', '.join(sorted(spoken))}; sidestep-cni speaks {', '.join(VERSIONS)}"


def is_raised(conf: Conf) -> bool:
    """Whether with_plugin() replaces the cniVersion by OLDEST_VERSION, because it is older."""
    return all(_is_old(version) for version in _versions(conf))


def wrapped_from(conf: Conf) -> Document | None:
    """File and cniVersion of the single plugin from which with_plugin() made this list; None if it did not."""
    marker = _kept(conf, _WRAPPED)
    stem = conf.file.removesuffix(LIST_SUFFIX)
    is_ours = (
        isinstance(marker, dict)
        and marker.get("file") in ((f"{stem}.conf", f"{stem}.json") if is_read(conf.file) else (conf.file,))
        and isinstance(marker.get("cniVersion"), str)
    )
    return marker if is_ours else None


def has_plugin(conf: Conf) -> bool:
    """Whether the configuration has an entry of ours."""
    return any(_is(plugin, PLUGIN) for plugin in conf.plugins)


def fault_of_list(conf: Conf, entry: Document) -> str:
    """What is wrong with our entry in the configuration, for messages; empty if nothing is."""
    if with_plugin(conf, entry) == conf:
        return ""
    if not has_plugin(conf):
        return "entry missing"
    if len(set(conf.types) & set(REPLACED)):
        return "another capturing plugin in the chain"
    if conf.types.count(PLUGIN) > 1:
        return "more than one entry"
    return "entry changed" if conf.types[-1] == PLUGIN else "entry not last"


def replaced_types(conf: Conf) -> list[str]:
    """The types of the plugins that with_plugin() drops."""
    return [kind for kind in conf.types if kind in REPLACED]


def list_file(file: str) -> str:
    """The file name of the list that is made from a single plugin's file.

    A file with another ending keeps its name, as in Istio. No runtime reads it, so its content alone says what it is.
    """
    return file.rpartition(".")[0] + LIST_SUFFIX if is_read(file) else file


def is_read(file: str) -> bool:
    """Whether runtimes read files with this ending."""
    return file.endswith(SUFFIXES)


def siblings(file: str) -> tuple[str, ...]:
    """A chosen file, and what Istio takes in its place: .conflist for .conf and the other way round, nothing else."""
    stem, _, ending = file.rpartition(".")
    if f".{ending}" not in (".conf", LIST_SUFFIX):
        return (file,)
    return tuple(dict.fromkeys((file, stem + LIST_SUFFIX, stem + ".conf")))


def first_valid(files: Mapping[str, bytes]) -> tuple[Conf | None, list[InvalidConf]]:
    """The configuration that a runtime takes from `files` (name → content), and why it rejects the files before it.

    The caller leaves out files that no runtime reads, unless they were chosen. A file with no plugin but ours or those
    of REPLACED is passed over: a standalone installation has left it there.
    """
    problems = []
    for file in sorted(files):
        try:
            conf = parse_list(file, files[file])
        except InvalidConf as problem:
            problems.append(problem)
        else:
            if set(conf.types) - {PLUGIN, *REPLACED}:
                return conf, problems
    return None, problems


def _inserted(conf: Conf, entry: Document) -> Conf:
    kept: Document = {_WRAPPED: wrapped_from(conf), _RAISED: _kept(conf, _RAISED)}
    raised: Document = {}
    if is_raised(conf):
        kept[_RAISED] = str(conf.document.get("cniVersion", ""))
        raised = {"cniVersion": OLDEST_VERSION}
    last = {**entry, **{key: value for key, value in kept.items() if value is not None}}
    return Conf(conf.file, {**conf.document, **raised, "plugins": [*_others(conf.plugins), last]})


def _decoded(file: str, content: bytes) -> Any:
    """Parse JSON as Go's decoder does: UTF-8, finite numbers, bounded depth. Raises InvalidConf."""
    try:
        text = content.decode(errors="replace")
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidConf(f"{file} is not JSON: {error}") from error


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _is_list(file: str, document: Document) -> bool:
    return file.endswith(LIST_SUFFIX) or (not is_read(file) and "type" not in document)


def _is_plugin(plugin: Any) -> bool:
    return isinstance(plugin, dict) and isinstance(plugin.get("type"), str) and bool(plugin["type"])


def _network(conf: Conf) -> str:
    """The network's name, which must not change: IPAM plugins keep their state by it.

    If the configuration has no name, CRI-O uses the name of the file, so we do too.
    """
    return str(conf.document.get("name") or conf.file)


def _kept(conf: Conf, key: str) -> Any:
    """The value of a key in our entry; of several entries of ours, the first that has the key counts."""
    return next((plugin[key] for plugin in conf.plugins if _is(plugin, PLUGIN) and key in plugin), None)


def _versions(conf: Conf) -> set[str]:
    """The versions from which a runtime may choose: cniVersion, and for newer runtimes (libcni 1.3) cniVersions.

    A newer runtime takes the highest version of cniVersions that it knows.
    """
    more = conf.document.get("cniVersions", ())
    return {str(conf.document.get("cniVersion", "")), *(map(str, more) if isinstance(more, list) else ())}


def _others(plugins: Iterable[Document]) -> list[Document]:
    return [plugin for plugin in plugins if plugin["type"] not in (PLUGIN, *REPLACED)]


def _is(plugin: Document, kind: str) -> bool:
    return bool(plugin.get("type") == kind)


def _is_old(version: str) -> bool:
    """Whether a cniVersion is older than OLDEST_VERSION. An empty one counts as older."""
    parts = version.split(".")
    if not all(part.isdecimal() and len(part) < 4 for part in parts):
        return not version
    return tuple(map(int, parts)) < tuple(map(int, OLDEST_VERSION.split(".")))
