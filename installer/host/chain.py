"""The plugin's place in a CNI configuration: pure functions from documents to documents.

A runtime takes the first valid file of its directory, in the order of names: a list of plugins (.conflist), or a single
plugin (.conf, .json), which has no place for a second one and has to become a list.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bpf.errors import SidestepError
from installer.settings import Node

PLUGIN = "sidestep-cni"
# what sidestep takes the place of: two capturing plugins in one chain would both act
REPLACED = ("istio-cni",)
# the network that Istio's injector asks multus for (annotation k8s.v1.cni.cncf.io/networks: default/istio-cni)
STANDALONE_NETWORK = "istio-cni"
STANDALONE_FILE = "YYY-sidestep-cni.conf"
LIST_SUFFIX = ".conflist"
SUFFIXES = (".conf", LIST_SUFFIX, ".json")
# what the plugin speaks; older versions have no previous result in the form that a chain needs, except for 0.3.0, which
# is 0.3.1 under another name and which Weave and kube-router still write
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
OLDEST_VERSION = VERSIONS[0]
# kept in our own entry of a list that was a single plugin: the file and the cniVersion ("" for none) that it had
_WRAPPED = "wrapped"
# kept in our own entry of a list whose cniVersion was older than the plugin's oldest: what it was ("" for none)
_RAISED = "raised_from"
# kept in our own entry of a list of our own: the primary configuration's file, of which it has everything
_MADE_FROM = "made_from"

Document = dict[str, Any]


class InvalidConf(SidestepError):
    """A file that a runtime would not take as a CNI configuration."""


@dataclass(frozen=True)
class Conf:
    """A configuration by its file's name."""

    file: str
    document: Document

    @property
    def is_list(self) -> bool:
        """Whether it is a list of plugins rather than a single one."""
        return self.file.endswith(LIST_SUFFIX)

    @property
    def plugins(self) -> list[Document]:
        """Its plugins in order."""
        return list(self.document["plugins"]) if self.is_list else [self.document]

    @property
    def types(self) -> list[str]:
        """Which plugins those are."""
        return [str(plugin.get("type")) for plugin in self.plugins]

    def render(self) -> bytes:
        """The file's content, ASCII: a string may hold half a surrogate pair, which has no UTF-8."""
        return (json.dumps(self.document, indent=2, allow_nan=False) + "\n").encode("ascii")


def parse_list(file: str, content: bytes) -> Conf:
    """A file as a runtime reads it. Raises InvalidConf saying what it lacks."""
    document = _decoded(file, content)
    if not isinstance(document, dict):
        raise InvalidConf(f"{file} is no JSON object")
    if not isinstance(document.get("cniVersion", ""), str):
        raise InvalidConf(f'{file} has a "cniVersion" that is no string')
    if not file.endswith(LIST_SUFFIX):
        if not _is_plugin(document):
            raise InvalidConf(f'{file} has no "type"; a list of plugins belongs into a {LIST_SUFFIX} file')
        if not isinstance(document.get("name", ""), str):
            raise InvalidConf(f'{file} has a "name" that is no string')
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
    """Our object of the list."""
    return {
        "type": PLUGIN,
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "cgroupPath": True},
        "cni_agent_run_dir": str(node.cni_agent_run_dir),
        "agent_timeout_seconds": node.agent_timeout_seconds,
        "pod_namespace": node.pod_namespace,
        "exclude_namespaces": list(node.exclude_namespaces),
    }


def standalone(file: str, entry: Document) -> Conf:
    """A network of our own, which multus calls beside the pod's."""
    return Conf(file, {"cniVersion": OLDEST_VERSION, "name": STANDALONE_NETWORK, **entry})


def owned(primary: Conf, entry: Document, file: str) -> Conf:
    """A list of our own with the primary one's network, version and plugins, and with us."""
    document = with_plugin(primary, entry).document
    return Conf(file, {**document, "plugins": [*_others(document["plugins"]), {**entry, _MADE_FROM: primary.file}]})


def is_owned(conf: Conf) -> bool:
    """Whether owned() has made it."""
    return conf.is_list and isinstance(_kept(conf, _MADE_FROM), str)


def with_plugin(conf: Conf, entry: Document) -> Conf:
    """The configuration with our entry last, and once; a single plugin becomes a list under its own network name."""
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
    """The configuration without us, as it was before; None when nothing is left of it, or it is ours as a whole."""
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
    """The configuration without us under its present name; None when nothing is left of it."""
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
    """Why the plugin could not work in this configuration; empty when it can.

    Its pods would all fail, also those outside of the mesh, so it must not be put in.
    """
    spoken = _versions(conf)
    if is_raised(conf) or spoken & set(VERSIONS):
        return ""
    return f"{conf.file} has cniVersion {', '.join(sorted(spoken))}; sidestep-cni speaks {', '.join(VERSIONS)}"


def is_raised(conf: Conf) -> bool:
    """Whether with_plugin() gives it a newer cniVersion."""
    return all(_is_old(version) for version in _versions(conf))


def wrapped_from(conf: Conf) -> Document | None:
    """The file and the cniVersion of the single plugin that we have made this list from; None when we have not."""
    marker = _kept(conf, _WRAPPED)
    stem = conf.file.removesuffix(LIST_SUFFIX)
    is_ours = (
        isinstance(marker, dict)
        and marker.get("file") in (f"{stem}.conf", f"{stem}.json")
        and isinstance(marker.get("cniVersion"), str)
    )
    return marker if is_ours else None


def has_plugin(conf: Conf) -> bool:
    """Whether we are in it."""
    return any(_is(plugin, PLUGIN) for plugin in conf.plugins)


def fault_of_list(conf: Conf, entry: Document) -> str:
    """What is wrong with our place in it, for messages; empty when nothing is."""
    if with_plugin(conf, entry) == conf:
        return ""
    if not has_plugin(conf):
        return "entry missing"
    if len(set(conf.types) & set(REPLACED)):
        return "another capturing plugin in it"
    if conf.types.count(PLUGIN) > 1:
        return "entry there more than once"
    return "entry changed" if conf.types[-1] == PLUGIN else "entry not last"


def replaced_types(conf: Conf) -> list[str]:
    """Which plugins with_plugin() takes out."""
    return [kind for kind in conf.types if kind in REPLACED]


def list_file(file: str) -> str:
    """The name of the list that a single plugin's file becomes."""
    return file.rpartition(".")[0] + LIST_SUFFIX


def siblings(file: str) -> tuple[str, ...]:
    """A chosen file and the names that the same network may have instead."""
    stem = file.rpartition(".")[0] if file.endswith(SUFFIXES) else file
    return tuple(dict.fromkeys((file, stem + LIST_SUFFIX, stem + ".conf")))


def first_valid(files: Mapping[str, bytes]) -> tuple[Conf | None, list[InvalidConf]]:
    """The configuration that a runtime takes, and what is wrong with those before it."""
    problems = []
    for file in sorted(files):
        try:
            conf = parse_list(file, files[file])
        except InvalidConf as problem:
            problems.append(problem)
        else:
            if set(conf.types) - {
                PLUGIN,
                *REPLACED,
            }:  # else a network of our own that a standalone installation has left
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
    """JSON as Go's decoder takes it: UTF-8, finite numbers, bounded depth. Raises InvalidConf."""
    try:
        text = content.decode(errors="replace")
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidConf(f"{file} is not JSON: {error}") from error


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _is_plugin(plugin: Any) -> bool:
    return isinstance(plugin, dict) and isinstance(plugin.get("type"), str) and bool(plugin["type"])


def _network(conf: Conf) -> str:
    """IPAM plugins keep their state by network name. CRI-O names a network without name after its file."""
    return str(conf.document.get("name") or conf.file)


def _kept(conf: Conf, key: str) -> Any:
    """What the first of our entries that has the key keeps there."""
    return next((plugin[key] for plugin in conf.plugins if _is(plugin, PLUGIN) and key in plugin), None)


def _versions(conf: Conf) -> set[str]:
    """What a runtime may choose from: a newer one (libcni 1.3) takes the highest of the second key that it knows."""
    more = conf.document.get("cniVersions", ())
    return {str(conf.document.get("cniVersion", "")), *(map(str, more) if isinstance(more, list) else ())}


def _others(plugins: Iterable[Document]) -> list[Document]:
    return [plugin for plugin in plugins if plugin["type"] not in (PLUGIN, *REPLACED)]


def _is(plugin: Document, kind: str) -> bool:
    return bool(plugin.get("type") == kind)


def _is_old(version: str) -> bool:
    """Whether it is older than what the plugin speaks; no version at all is the oldest."""
    parts = version.split(".")
    if not all(part.isdecimal() and len(part) < 4 for part in parts):
        return not version
    return tuple(map(int, parts)) < tuple(map(int, OLDEST_VERSION.split(".")))
