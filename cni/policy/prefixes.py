"""Turns the ranges of a policy into prefixes for a longest-prefix-match table.

Istio's rules check the excluded ranges first, so an exclude beats an include even if the include is the longer prefix.
The table returns the longest match, so it must not have includes inside excludes.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from cni.policy.annotations import CapturePolicy, Network


class Prefix(NamedTuple):
    """One entry of the table."""

    network: Network
    verdict: Literal["exclude", "include"]


def effective_prefixes(policy: CapturePolicy) -> tuple[Prefix, ...]:
    """The entries whose longest match answers rules O8 and O10: exclude, include or no match.

    They are sorted by family and address. Entries that change no answer are left out, and so are all includes if
    everything is included anyway. The table must keep IPv4 and IPv6 apart: ::/0 says nothing about IPv4.
    """
    includes = () if policy.outbound_all else policy.include_outbound
    prefixes = [Prefix(network, "exclude") for network in policy.exclude_outbound]
    prefixes += (Prefix(network, "include") for network in includes)
    return (*_outermost(prefixes, 4), *_outermost(prefixes, 6))


def _outermost(prefixes: Iterable[Prefix], family: int) -> Iterable[Prefix]:
    """The prefixes of a family (4 or 6), without those inside an exclude and without includes inside an include.

    Two prefixes either nest or have no address in common. Sorted by first address and length, the outer prefix comes
    first. So it is enough to remember where the last exclude and the last include end.
    """
    excluded_to = included_to = -1
    for prefix in sorted((each for each in prefixes if each.network.version == family), key=_order):
        first, last = int(prefix.network[0]), int(prefix.network[-1])
        if first <= excluded_to:
            continue
        if prefix.verdict == "exclude":
            excluded_to = last
            yield prefix
        elif first > included_to:
            included_to = last
            yield prefix


def _order(prefix: Prefix) -> tuple[int, int, str]:
    # "exclude" sorts before "include" of the same network
    return int(prefix.network.network_address), prefix.network.prefixlen, prefix.verdict
