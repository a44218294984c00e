"""What is held against what should be: each check a sentence and a look, counted at the end."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import click

from tests.cluster.host import CommandFailed, DaemonEnded
from tests.cluster.pods import PodName, Pods, Reply
from tests.lab.waiting import wait_until

# by these, whoever looks or does something tells that it did not work
FAULTS = (CommandFailed, DaemonEnded, LookupError, TimeoutError)
_AT_ONCE = 4


@dataclass(frozen=True)
class Check:
    """`look` returns what is wrong, "" if nothing is."""

    sentence: str
    look: Callable[[], str]


def is_as_expected(check: Check, scenario: str) -> bool:
    """Look, and say a line of it, which begins with the scenario's name: others may run beside it."""
    try:
        wrong = check.look()
    except FAULTS as error:
        wrong = f"{type(error).__name__}: {error}"
    click.echo(f"{scenario}: {check.sentence}: {f'NOT as expected: {wrong}' if wrong else 'as expected'}")
    return not wrong


def answered_by(pods: Pods, client: PodName, host: str, server: PodName, *identities: str) -> Callable[[], str]:
    """The server answers; the proxies between say these `identities`, none if none are given."""

    def look() -> str:
        return wrong_with(pods.ask(client, host), server, identities)

    return look


def at_once(checks: Iterable[Check]) -> list[Check]:
    """The same checks, which all look now, side by side: most of a look is waiting for a program that was started."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looks = [(each.sentence, pool.submit(each.look)) for each in checks]
    return [Check(sentence, look.result) for sentence, look in looks]


def soon(look: Callable[[], str], seconds: float = 30) -> Callable[[], str]:
    """The same, for what takes a while until everybody has heard of it: the last answer counts."""

    def look_again() -> str:
        found = ""

        def is_right() -> bool:
            nonlocal found
            found = look()
            return not found

        with suppress(TimeoutError):
            wait_until(is_right, "it", seconds)
        return found

    return look_again


def equals(ask: Callable[[], object], wanted: object) -> Callable[[], str]:
    """What is found is `wanted`."""

    def look() -> str:
        found = ask()
        return "" if found == wanted else str(found)

    return look


def wrong_with(reply: Reply, server: PodName, identities: Iterable[str]) -> str:
    """What is wrong with it, "" if nothing is."""
    if reply.server != server.name:
        return reply.error or f"answered by {reply.server or 'nobody'}"
    missing = [each for each in identities if each not in reply.identities]
    if missing or (reply.identities and not identities):
        return f"the proxies said {reply.identities or 'nothing'}"
    return ""
