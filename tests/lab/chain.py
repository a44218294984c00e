"""Runs a CNI conf list the way libcni does: ADD in order with the previous result passed on, DEL in reverse."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.inside import popen


class CniFailed(Exception):
    """A plugin's error object."""

    def __init__(self, plugin: str, error: dict[str, Any]) -> None:
        super().__init__(f"{plugin}: {error.get('msg')}")
        self.plugin, self.code, self.message = plugin, error.get("code"), str(error.get("msg"))


@dataclass(frozen=True)
class Attachment:
    """What a runtime knows of one pod's network."""

    container_id: str
    netns: Path | None
    pod: Mapping[str, str]
    ifname: str = "eth0"
    cgroup_path: str = ""  # the pod's cgroup, if the runtime passes that

    def environment(self, command: str, plugin_path: str) -> dict[str, str]:
        """The CNI_* variables of an invocation."""
        args = {"IgnoreUnknown": "1", "K8S_POD_INFRA_CONTAINER_ID": self.container_id, **self.pod}
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": str(self.netns or ""),
            "CNI_IFNAME": self.ifname,
            "CNI_PATH": plugin_path,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in args.items()),
        }


@dataclass(frozen=True)
class Chain:
    """A conf list and where its plugins are; they run in the node's namespace, as a runtime's would."""

    conflist: dict[str, Any]
    plugin_dirs: tuple[Path, ...]
    node_netns: Path

    def add(self, attachment: Attachment) -> dict[str, Any]:
        """The last plugin's result. Raises CniFailed; what was made so far stays, as with libcni, until a DEL."""
        result: dict[str, Any] | None = None
        for plugin in self.conflist["plugins"]:
            result = self.run("ADD", plugin, attachment, result)
        assert result is not None
        return result

    def delete(self, attachment: Attachment, result: dict[str, Any] | None = None) -> None:
        """DEL of every plugin, last first."""
        for plugin in reversed(self.conflist["plugins"]):
            self.run("DEL", plugin, attachment, result)

    def check(self, attachment: Attachment, result: dict[str, Any]) -> None:
        """CHECK of sidestep's plugin, the last one."""
        self.run("CHECK", self.conflist["plugins"][-1], attachment, result)

    def run(
        self, command: str, plugin: dict[str, Any], attachment: Attachment, result: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """One plugin once; returns the object it printed, None when it printed nothing."""
        config = {**plugin, "name": self.conflist["name"], "cniVersion": self.conflist["cniVersion"]}
        if result is not None:
            config["prevResult"] = result
        if attachment.cgroup_path and plugin.get("capabilities", {}).get("cgroupPath"):
            config["runtimeConfig"] = {"cgroupPath": attachment.cgroup_path}
        process = popen(
            self.node_netns,
            None,
            [self._binary(plugin["type"])],
            0,
            0,
            env=attachment.environment(command, ":".join(map(str, self.plugin_dirs))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, log = process.communicate(json.dumps(config), timeout=30)
        printed: dict[str, Any] | None = json.loads(out) if out.strip() else None
        if process.returncode != 0:
            raise CniFailed(plugin["type"], printed or {"msg": log.strip() or f"exit {process.returncode}"})
        return printed

    def _binary(self, plugin: str) -> Path:
        return next(each / plugin for each in self.plugin_dirs if (each / plugin).exists())
