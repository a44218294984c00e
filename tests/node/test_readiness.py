"""/readyz and sidestep_attached follow what is there now: they are taken back when it ends, and come back with it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from bpf import syscalls
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from tests.lab.apiserver import ApiServer
from tests.lab.node import Node
from tests.lab.waiting import wait_until
from tests.node.test_observation import port, scrape


def missing(node: Node) -> dict[str, str]:
    """The conditions that do not hold, with their reasons."""
    try:
        with urlopen(f"http://127.0.0.1:{port(node, 'health')}/readyz", timeout=5) as answer:
            assert answer.status == 200
            return {}
    except HTTPError as error:
        found: dict[str, str] = json.load(error)["missing"]
        return found


def test_attached_ends_with_a_link_and_comes_back_with_it(node: Node) -> None:
    assert missing(node) == {}
    path = Pins(node.bpffs).links / "connect4"
    with Descriptor(syscalls.open_pin(path)) as link:
        syscalls.detach_link(link.fd, path)
    assert missing(node) == {"attached": "a link, program or map is gone; `sidestep status` says which"}
    assert scrape(node)["sidestep_attached",] == 0
    wait_until(lambda: missing(node) == {}, "the link to come back", 60)
    assert scrape(node)["sidestep_attached",] == 1


def test_serving_ends_with_the_socket_and_comes_back_with_it(node: Node) -> None:
    os.kill(node.agent.pid, signal.SIGSTOP)  # or it is back before it can be asked
    shutil.rmtree(node.run_dir)
    os.kill(node.agent.pid, signal.SIGCONT)
    wait_until(lambda: "event=socket.restored" in node.agent.log.read_text(), "the socket to come back")
    assert missing(node) == {}
    node.pod("alpha")
    node.run_dir.rename(node.run_dir.with_suffix(".away"))
    node.run_dir.write_text("in the way")
    assert missing(node) == {"serving": f"{node.run_dir}/cni.sock is gone"}
    node.run_dir.unlink()
    wait_until(lambda: missing(node) == {}, "the socket to come back")
    node.pod("beta")


def test_synced_ends_with_the_directory_of_pods_and_comes_back_with_it(node: Node) -> None:
    away = Path(f"{node.pods_dir}.away")
    node.pods_dir.rename(away)
    assert missing(node) == {"synced": "the directory can't be read"}
    away.rename(node.pods_dir)
    assert missing(node) == {}


def test_synced_ends_with_the_api_server_and_comes_back_with_it() -> None:
    with ApiServer().running() as api, Node(api=api) as node:
        wait_until(lambda: missing(node) == {}, "the first list")
        api.stop()
        wait_until(lambda: list(missing(node)) == ["synced"], "the agent to notice")
        assert re.match(r"for \d+ s: .*Connection refused", missing(node)["synced"])
        api.start()
        wait_until(lambda: missing(node) == {}, "the watch to come back", 40)
