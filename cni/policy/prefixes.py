"""Ranges of a policy → prefixes for a longest-prefix-match table.

Istio's rules ask for the excluded ranges first, so an exclude beats an include even when the include is the longer
prefix; a table that returns the longest match must therefore not have includes inside of excludes.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from cni.policy.annotations import CapturePolicy, Network


class Prefix(NamedTuple):
    """One entry of the table."""

    network: Network
    verdict: Literal["exclude", "include"]


def effective_prefixes(policy: CapturePolicy) -> tuple[Prefix, ...]:
    """The fewest-to-write entries whose longest match answers rules O8 and O10: exclude, include or no match.

    Sorted by family and address. Includes are left out when everything is included anyway. IPv4 and IPv6 prefixes must
    be kept apart in the table: ::/0 says nothing about IPv4.
    """
    includes = () if policy.outbound_all else policy.include_outbound
    prefixes = [Prefix(network, "exclude") for network in policy.exclude_outbound]
    prefixes += (Prefix(network, "include") for network in includes)
    return (*_outermost(prefixes, 4), *_outermost(prefixes, 6))


def _outermost(prefixes: Iterable[Prefix], family: int) -> Iterable[Prefix]:
    """Drops what lies within an exclude, and includes within an include.

    Prefixes nest or are apart, and sorted by first address and length the outer one comes first. So it is enough to
    remember where the last exclude and the last include end.
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
