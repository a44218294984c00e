"""The parts of a bug report. Each is made by itself: one that fails says why in its place, and the others are there."""

import json
import os
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bpf.compiler import sources_digest
from cni.protocol import Question
from installer import VERSION
from installer.commands.agent_socket import Told, ask_agent, silence, told_about
from installer.commands.bugreport.redaction import without_secrets
from installer.commands.crash_files import crash_files
from installer.settings import Chain, Node, Ports

_SECONDS = 60  # for each command
_LOCALHOST = "localhost"
# name → what it is, and the command that prints it
_COMMANDS = {
    "status.txt": ("the verdict, programs, maps, agent and ambient mode", ("status", "--verbose")),
    "status.json": ("the same as a document", ("status", "--output", "json")),
    "pods.txt": ("the mesh pods and their state", ("pods", "--output", "wide")),
    "pods.json": ("each mesh pod: policy, listeners, counts", ("pods", "--output", "json")),
    "coverage.json": ("what went past each pod's proxy", ("coverage", "--output", "json")),
    "flows.json": ("what each pod's connections carry", ("flows", "--output", "json")),
    "shadow.json": ("what was compared with Istio's rules", ("shadow", "--output", "json")),
    "refused.txt": ("the pods that the agent has refused, and why", ("pods", "--refused")),
    "maps.txt": ("how full each map is", ("maps",)),
    "probe.txt": ("what this kernel and node can do", ("probe",)),
    "migrate.txt": ("what istio-cni has on this node", ("migrate", "--check")),
    "report.html": ("traffic, failures and maps, for a browser", ("report",)),
}
# those that ask no agent, so they are made while it is asked
_WITHOUT_AGENT = ("maps.txt", "probe.txt", "migrate.txt")


@dataclass(frozen=True)
class Part:
    """One file of the archive."""

    name: str
    what: str
    content: bytes


def parts(settings: Mapping[str, str], node: Node, chain: Chain, ports: Ports) -> Iterator[Part]:
    """All of them. `settings` are the environment variables that commands get, besides this process's own."""
    yield Part("version.txt", "sidestep, kernel, machine", _version().encode())
    yield Part("settings.json", "the settings, by their environment variables", _json(settings))
    run_dir = node.cni_agent_run_dir
    # an agent that hangs is asked once: otherwise each part would wait for it anew
    with ThreadPoolExecutor(1) as beside:
        asking = beside.submit(ask_agent, run_dir, Question(command="WHAT_WAS_LOGGED").model_dump())
        printed = {name: _printed(_COMMANDS[name][1], settings) for name in _WITHOUT_AGENT}
        asked = asking.result()
    log = told_about(run_dir, "WHAT_WAS_LOGGED", asked)
    not_asked = f"not asked, as the agent is silent: {log.unknown}" if asked.is_silent else ""
    # one after the other: in the agent's container they share its memory limit with the agent
    for name, (what, argv) in _COMMANDS.items():
        if name not in printed:
            printed[name] = _printed(argv, {**settings, **silence(run_dir, asked)})
        yield Part(name, what, printed[name])
    yield Part("log.txt", "the agent's last log lines", _or_why(lambda: _lines(log)))
    for name, what, port, path in (
        ("metrics.txt", "what Prometheus is told", ports.monitoring_port, "metrics"),
        ("readyz.json", "what kubelet is told", ports.health_port, "readyz"),
    ):
        yield Part(name, what, _or_why(lambda port=port, path=path: _fetched(port, path, not_asked)))  # type: ignore[misc]
    yield from _configurations(chain.mounted_cni_net_dir)
    for crash in crash_files(node.cni_agent_run_dir):
        yield Part(crash.name, "an unforeseen error", _or_why(crash.read_bytes))


def _version() -> str:
    system = platform.uname()
    lines = (
        f"sidestep {VERSION}, programs {sources_digest().hex()}",
        f"kernel   {system.system} {system.release} {system.version} {system.machine}",
        f"python   {platform.python_version()}",
    )
    return "\n".join(lines) + "\n"


def _printed(argv: tuple[str, ...], settings: Mapping[str, str]) -> bytes:
    """All that a command of sidestep's prints, in a process of its own: whatever happens to it, the others go on."""
    command = [sys.executable, "-P", "-m", "installer", *argv]
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, env=environment, timeout=_SECONDS, **how)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return f"not known: `sidestep {' '.join(argv)}` has not ended within {_SECONDS} s\n".encode()
    printed: bytes = done.stdout or b""
    said: bytes = done.stderr or b""
    return printed if printed and not done.returncode else printed + said


def _lines(log: Told) -> bytes:
    if log.unknown:
        raise OSError(log.unknown)
    return "".join(f"{line}\n" for line in log.rows).encode()


def _fetched(port: int, path: str, not_asked: str) -> bytes:
    if not_asked:
        raise OSError(f"port {port}: {not_asked}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{_LOCALHOST}:{port}/{path}", timeout=10) as reply:
            told: bytes = reply.read()
    except urllib.error.HTTPError as error:  # /readyz says what is missing with 503
        told = error.read()
    except OSError as error:
        raise OSError(f"port {port}: {getattr(error, 'reason', error)}") from error
    return told


def _configurations(directory: Path) -> Iterator[Part]:
    """The CNI configuration, without what may be a secret."""
    try:
        files = sorted(each for each in directory.iterdir() if each.is_file())
    except OSError as error:
        yield Part(
            "cni/unknown.txt", "the CNI configuration", f"not known: {error.filename}: {error.strerror}\n".encode()
        )
        return
    for file in files:
        content = _or_why(lambda file=file: without_secrets(file.read_bytes()))  # type: ignore[misc]
        yield Part(f"cni/{file.name}", "CNI configuration of the node, without secrets", content)


def _or_why(made: Callable[[], bytes]) -> bytes:
    try:
        return made()
    except OSError as error:
        return f"not known: {error}\n".encode()


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
