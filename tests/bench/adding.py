"""Runs on a node as `python3 -I -S`: whole ADDs of several plugins in turn, each in a namespace that is new.

Reads a JSON object from stdin: `sides` (name → binary, config, whether it needs a DEL), `pods`, `namespace`, `levels`
(how many at once), `rounds`, `each` (ADDs a side and round). Prints level → round → side → seconds of each ADD.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Side = dict[str, Any]


class Turns:
    """What was asked for."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked

    def wave(self, side: Side, level: int) -> list[float]:
        """Seconds of that many ADDs at once; making the namespaces and taking them away is not timed."""
        numbers = range(level)
        with ThreadPoolExecutor(level) as pool:
            for number in numbers:
                make(number)
            try:
                seconds = list(pool.map(lambda number: self._timed(side, number), numbers))
                if side["deletes"]:
                    list(pool.map(lambda number: self._invoke(side, "DEL", number), numbers))
            finally:
                for number in numbers:
                    ip("netns", "del", f"bench-{number}")
        return seconds

    def turn(self, side: Side, level: int) -> list[float]:
        """Of all ADDs of a side in one round."""
        waves = max(1, self._asked["each"] // level)
        return [seconds for _ in range(waves) for seconds in self.wave(side, level)]

    def _timed(self, side: Side, number: int) -> float:
        began = time.perf_counter()
        self._invoke(side, "ADD", number)
        return time.perf_counter() - began

    def _invoke(self, side: Side, command: str, number: int) -> None:
        previous = {"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": f"10.99.0.{number + 1}/24"}]}
        config = {**side["config"], "cniVersion": "1.0.0", "name": "bench", "prevResult": previous}
        done = subprocess.run(
            [side["binary"]],
            input=json.dumps(config).encode(),
            env=self._environment(command, number),
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"{side['binary']} {command}: {(done.stdout + done.stderr).decode()[-1500:]}")

    def _environment(self, command: str, number: int) -> dict[str, str]:
        names = {"K8S_POD_NAMESPACE": self._asked["namespace"], "K8S_POD_NAME": self._asked["pods"][number]}
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"bench-{number}",
            "CNI_NETNS": f"/var/run/netns/bench-{number}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in ({"IgnoreUnknown": "1"} | names).items()),
        }


def make(number: int) -> None:
    """A namespace as the network's plugin leaves it."""
    name = f"bench-{number}"
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "link", "add", "eth0", "type", "bridge")
    ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", "eth0")
    ip("-n", name, "addr", "add", f"fd99::{number + 1}/64", "dev", "eth0", "nodad")
    ip("-n", name, "link", "set", "eth0", "up")


def ip(*argv: str) -> None:
    """Run it."""
    subprocess.run(["ip", *argv], check=True, capture_output=True)


def main(asked: dict[str, Any]) -> dict[int, list[dict[str, list[float]]]]:
    """All levels."""
    turns, found, sides = Turns(asked), {}, asked["sides"]
    for level in asked["levels"]:
        for side in sides.values():  # warm
            turns.wave(side, level)
        found[level] = [{name: turns.turn(side, level) for name, side in sides.items()} for _ in range(asked["rounds"])]
    return found


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
