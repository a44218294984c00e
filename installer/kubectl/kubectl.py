"""The user's own kubectl, which has their clusters, contexts and ways to log in."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

PROGRAM = "kubectl"


class KubectlFailed(click.ClickException):
    """kubectl said no. The message is what it said."""


@dataclass(frozen=True)
class Kubectl:
    """One cluster's. `options` go to each call, such as --context."""

    options: tuple[str, ...] = ()

    def command(self, *argv: str) -> list[str]:
        """The command line that asks this cluster."""
        return [PROGRAM, *self.options, *argv]

    def run(self, *argv: str, text: str = "") -> str:
        """What it prints; `text` is its input. Raises KubectlFailed."""
        done = self._done(argv, text)
        if done.returncode:
            raise KubectlFailed(_last_line(done.stderr) or f"{PROGRAM} {argv[0]} has failed")
        return done.stdout

    def items(self, *argv: str) -> list[dict[str, Any]]:
        """The objects that `kubectl get` finds. Raises KubectlFailed."""
        found: list[dict[str, Any]] = json.loads(self.run("get", "-o", "json", *argv))["items"]
        return found

    def one(self, *argv: str) -> dict[str, Any]:
        """The object that `kubectl get` finds. Raises KubectlFailed."""
        found: dict[str, Any] = json.loads(self.run("get", "-o", "json", *argv))
        return found

    def told(self, *argv: str) -> Any:
        """What a command that prints JSON tells, whatever its exit status. Raises KubectlFailed if it tells nothing."""
        done = self._done(argv)
        try:
            return json.loads(done.stdout)
        except ValueError:
            said = _last_line(done.stdout if done.returncode == 0 else done.stderr)
            raise KubectlFailed(said or f"{PROGRAM} {argv[0]} has printed nothing") from None

    def printed(self, *argv: str) -> bytes:
        """What it prints, byte by byte. Raises KubectlFailed."""
        done = self._start(self.command(*argv), stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            raise KubectlFailed(_last_line(done.stderr.decode(errors="replace")) or f"{PROGRAM} {argv[0]} has failed")
        printed: bytes = done.stdout
        return printed

    def follow(self, *argv: str) -> int:
        """Run it with this terminal as its own; its exit status."""
        return self._start(self.command(*argv)).returncode

    def _done(self, argv: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return self._start(self.command(*argv), input=text, capture_output=True, text=True)

    def _start(self, command: list[str], **how: Any) -> subprocess.CompletedProcess[Any]:
        try:
            return subprocess.run(command, **how)
        except FileNotFoundError:
            raise KubectlFailed(f"{PROGRAM} is not on the PATH") from None


def _last_line(text: str) -> str:
    """What was wrong: kubectl's last words, without the status of a command that it ran in a container.

    Without kubectl's own "error:" too, as click puts one before the message.
    """
    lines = [each.strip() for each in text.splitlines() if each.strip()]
    told = [each for each in lines if not each.startswith("command terminated with exit code")]
    return (told or lines or [""])[-1].removeprefix("error: ")
