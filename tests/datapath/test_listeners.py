"""Which of a proxy's listening sockets get connections: many workers, both families, a successor."""

import pytest

from tests.datapath.conftest import PROXY, Wire

WORKERS = [2, 16, 17, 64]


def who_answers(wire: Wire) -> set[str]:
    """In either family, whatever socket of the group the kernel chooses."""
    answers = [wire.peer.dial(ip, 8080) for ip in (wire.pod.ip4, wire.pod.ip6) for _ in range(2)]
    return {each.get("who") or each["error"] for each in answers}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_proxy_with_many_workers_serves_both_families(wire: Wire, workers: int) -> None:
    """Envoy binds the sockets of all workers for one address, then those for the next (additional_addresses)."""
    wire.enrol()
    wire.pod.serve("inbound", f"15006x{workers}", uid=PROXY)
    assert who_answers(wire) == {"inbound"}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ends", ["old", "new"])
def test_a_proxy_and_its_successor_may_listen_at_once(wire: Wire, workers: int, ends: str) -> None:
    """The old closes its sockets after the new has opened its own, or the new fails and the old goes on."""
    wire.enrol()
    proxies = {name: wire.pod.serve(name, f"15006x{workers}", uid=PROXY) for name in ("old", "new")}
    assert who_answers(wire) <= {"old", "new"}
    wire.pod.end(proxies.pop(ends))
    assert who_answers(wire) == set(proxies)
