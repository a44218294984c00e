"""The plugin called again for what it knows: by multus, by a runtime that tries again, without a chain before it."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.lab.chain import Attachment, Chain
from tests.lab.node import Node
from tests.lab.sandboxes import Sandboxes


class Standalone:
    """The plugin as a network of its own, which multus calls with an interface of its own after the chain."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self.chain: Chain = replace(
            sandboxes.chain, conflist={"cniVersion": "1.1.0", "name": "sidestep", "plugins": [sandboxes.plugin]}
        )
        self.plugin = sandboxes.plugin

    def run(self, command: str, attachment: Attachment, **options: Any) -> Any:
        return self.chain.run(command, {**self.plugin, **options}, replace(attachment, ifname="net1"))


@pytest.fixture(scope="module")
def shared() -> Iterator[Sandboxes]:
    with Node() as node:
        yield Sandboxes(node, 1)


@pytest.fixture
def sandboxes(shared: Sandboxes) -> Iterator[Sandboxes]:
    """With nobody enrolled, before and after."""
    yield shared
    chain = replace(shared.chain, conflist={**shared.chain.conflist, "cniVersion": "1.1.0"})
    for name in (shared.chain.conflist["name"], "sidestep"):
        everything = replace(chain, conflist={**chain.conflist, "name": name})
        everything.run("GC", {**shared.plugin, "cni.dev/valid-attachments": []}, Attachment("", None, {}, ""))
    assert shared.node.entries()["pods"] == 0


@pytest.fixture
def standalone(sandboxes: Sandboxes) -> Standalone:
    return Standalone(sandboxes)


def test_without_a_chain_before_it_the_result_is_empty(sandboxes: Sandboxes, standalone: Standalone) -> None:
    attachment = sandboxes.attachment(0)
    assert standalone.run("ADD", attachment) == {"cniVersion": "1.1.0"}
    assert sandboxes.node.entries()["pods"] == 1
    assert standalone.run("CHECK", attachment) is None
    assert standalone.run("ADD", attachment) == {"cniVersion": "1.1.0"}
    assert standalone.run("CHECK", attachment) is None
    assert standalone.run("DEL", attachment) is None
    assert sandboxes.node.entries()["pods"] == 0
    assert standalone.run("DEL", attachment) is None


def test_a_second_attachment_that_goes_leaves_the_pod_captured(sandboxes: Sandboxes, standalone: Standalone) -> None:
    attachment = sandboxes.attachment(0)
    sandboxes.run("ADD", attachment)
    once = sandboxes.node.entries()
    standalone.run("ADD", attachment)
    assert sandboxes.node.entries() == once
    sandboxes.run("CHECK", attachment)
    standalone.run("CHECK", attachment)
    standalone.run("DEL", attachment)
    sandboxes.run("CHECK", attachment)
    sandboxes.run("DEL", attachment)
    assert sandboxes.node.entries()["pods"] == 0


def test_a_second_network_does_not_collect_what_the_first_enrolled(
    sandboxes: Sandboxes, standalone: Standalone
) -> None:
    attachment = sandboxes.attachment(0)
    sandboxes.run("ADD", attachment)
    standalone.run("ADD", attachment)
    nobody = Attachment("", None, {}, "")
    standalone.chain.run("GC", {**sandboxes.plugin, "cni.dev/valid-attachments": []}, nobody)
    sandboxes.run("CHECK", attachment)


def test_a_container_made_anew_in_the_same_namespace_takes_the_pod_over(sandboxes: Sandboxes) -> None:
    earlier = sandboxes.attachment(0)
    sandboxes.run("ADD", earlier)
    later = replace(earlier, container_id=uuid.uuid4().hex, ifname="eth1")
    sandboxes.run("ADD", later)
    sandboxes.run("DEL", earlier)
    sandboxes.run("CHECK", later)
    sandboxes.run("DEL", replace(later, netns=None))
    assert sandboxes.node.entries()["pods"] == 0
