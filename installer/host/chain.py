"""The plugin's place in a CNI configuration: pure functions from documents to documents.

A runtime takes the first valid file of its directory, in the order of names: a list of plugins (.conflist), or a single
plugin (.conf, .json), which has no place for a second one and has to become a list.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
# chains need the previous result, which this is the oldest version to have in the form that the plugin reads
OLDEST_VERSION = "0.3.1"
# kept in our own entry of a list that was a single plugin: the file and the cniVersion ("" for none) that it had
_WRAPPED = "wrapped"

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
        """The file's content."""
        return (json.dumps(self.document, indent=2, ensure_ascii=False) + "\n").encode()


def parse(file: str, content: bytes) -> Conf:
    """A file as a runtime reads it. Raises InvalidConf saying what it lacks."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise InvalidConf(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidConf(f"{file} is no JSON object")
    if not file.endswith(LIST_SUFFIX):
        if not isinstance(document.get("type"), str) or not document["type"]:
            raise InvalidConf(f'{file} has no "type"; a list of plugins belongs into a {LIST_SUFFIX} file')
        return Conf(file, document)
    plugins = document.get("plugins")
    if not document.get("name"):
        raise InvalidConf(f'{file} has no "name"')
    if not isinstance(plugins, list) or not plugins:
        raise InvalidConf(f'{file} has no "plugins"')
    if not all(isinstance(plugin, dict) and plugin.get("type") for plugin in plugins):
        raise InvalidConf(f'{file} has a plugin without "type"')
    return Conf(file, document)


def entry_of(node: Node) -> Document:
    """Our object of the list."""
    return {
        "type": PLUGIN,
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "cgroupPath": True},
        "cni_agent_run_dir": str(node.cni_agent_run_dir),
        "pod_namespace": node.pod_namespace,
        "exclude_namespaces": list(node.exclude_namespaces),
    }


def standalone(file: str, entry: Document) -> Conf:
    """A network of our own, which multus calls beside the pod's."""
    return Conf(file, {"cniVersion": OLDEST_VERSION, "name": STANDALONE_NETWORK, **entry})


def with_plugin(conf: Conf, entry: Document) -> Conf:
    """The configuration with our entry last, and once; a single plugin becomes a list under its own network name."""
    if conf.is_list:
        wrapped = next((each[_WRAPPED] for each in conf.plugins if _is(each, PLUGIN) and _WRAPPED in each), None)
        last = entry if wrapped is None else {**entry, _WRAPPED: wrapped}
        return Conf(conf.file, {**conf.document, "plugins": [*_others(conf.plugins), last]})
    version = str(conf.document.get("cniVersion", ""))
    plugin = {key: value for key, value in conf.document.items() if key not in ("cniVersion", "name")}
    document: Document = {
        "cniVersion": version if _number(version) >= _number(OLDEST_VERSION) else OLDEST_VERSION,
        # IPAM plugins keep their state by network name
        "name": conf.document.get("name") or conf.document["type"],
        "plugins": [plugin, {**entry, _WRAPPED: {"file": conf.file, "cniVersion": version}}],
    }
    return Conf(list_file(conf.file), document)


def without_plugin(conf: Conf) -> Conf | None:
    """The configuration without us, as it was before; None when nothing is left of it."""
    if not conf.is_list:
        return None if _is(conf.document, PLUGIN) else conf
    others = [plugin for plugin in conf.plugins if not _is(plugin, PLUGIN)]
    if not others:
        return None
    ours = [plugin for plugin in conf.plugins if _is(plugin, PLUGIN)]
    if len(others) > 1 or not any(_WRAPPED in plugin for plugin in ours):
        return Conf(conf.file, {**conf.document, "plugins": others})
    before = next(plugin[_WRAPPED] for plugin in ours if _WRAPPED in plugin)
    head = {"cniVersion": before["cniVersion"]} if before["cniVersion"] else {}
    return Conf(before["file"], {**head, "name": conf.document["name"], **others[0]})


def has_plugin(conf: Conf) -> bool:
    """Whether we are in it."""
    return any(_is(plugin, PLUGIN) for plugin in conf.plugins)


def was_wrapped(conf: Conf) -> bool:
    """Whether we have made this list from a single plugin."""
    return any(_is(plugin, PLUGIN) and _WRAPPED in plugin for plugin in conf.plugins)


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
            conf = parse(file, files[file])
        except InvalidConf as problem:
            problems.append(problem)
        else:
            if set(conf.types) - {
                PLUGIN,
                *REPLACED,
            }:  # else a network of our own that a standalone installation has left
                return conf, problems
    return None, problems


def _others(plugins: Iterable[Document]) -> list[Document]:
    return [plugin for plugin in plugins if plugin["type"] not in (PLUGIN, *REPLACED)]


def _is(plugin: Document, kind: str) -> bool:
    return bool(plugin.get("type") == kind)


def _number(version: str) -> tuple[int, ...]:
    """For comparison; what is no version counts as the oldest."""
    return tuple(int(part) for part in version.split(".")) if version.replace(".", "").isdigit() else (0,)
