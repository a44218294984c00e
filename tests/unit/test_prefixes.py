"""A longest-prefix-match table with the effective prefixes answers what Istio's rules say."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from cni.policy.annotations import CapturePolicy, Network
from cni.policy.prefixes import Prefix, effective_prefixes

IPAddress = IPv4Address | IPv6Address


def prefixes(exclude: str = "", include: str | None = None) -> list[tuple[str, str]]:
    policy = CapturePolicy(
        outbound_all=include is None,
        exclude_outbound=tuple(map(ip_network, exclude.split())),
        include_outbound=tuple(map(ip_network, (include or "").split())),
    )
    return [(str(network), verdict) for network, verdict in effective_prefixes(policy)]


def longest_match(table: tuple[Prefix, ...], address: IPAddress) -> str | None:
    matches = [prefix for prefix in table if address in prefix.network]
    return max(matches, key=lambda prefix: prefix.network.prefixlen).verdict if matches else None


def direct_reading(policy: CapturePolicy, address: IPAddress) -> str | None:
    if any(address in network for network in policy.exclude_outbound):
        return "exclude"
    if not policy.outbound_all and any(address in network for network in policy.include_outbound):
        return "include"
    return None


repeatable = settings(derandomize=True, deadline=None, max_examples=300)

# few distinct bits, so that ranges often nest, touch and repeat, and addresses often fall inside
bits4 = st.integers(0, 15).map(lambda n: (n & 12) << 28 | (n & 3))
bits6 = st.integers(0, 15).map(lambda n: (n & 12) << 124 | (n & 3))
networks4 = st.builds(
    lambda bits, length: IPv4Network((bits, length), strict=False), bits4, st.sampled_from([0, 1, 2, 3, 30, 31, 32])
)
networks6 = st.builds(
    lambda bits, length: IPv6Network((bits, length), strict=False), bits6, st.sampled_from([0, 1, 2, 3, 126, 127, 128])
)
ranges: st.SearchStrategy[tuple[Network, ...]] = st.lists(networks4 | networks6, max_size=8).map(tuple)
addresses = st.lists(st.builds(IPv4Address, bits4) | st.builds(IPv6Address, bits6), min_size=1, max_size=8)


@repeatable
@given(ranges, ranges, st.booleans(), addresses)
def test_the_longest_match_agrees_with_a_direct_reading_of_the_rules(
    exclude: tuple[Network, ...], include: tuple[Network, ...], outbound_all: bool, asked: list[IPAddress]
) -> None:
    policy = CapturePolicy(outbound_all=outbound_all, exclude_outbound=exclude, include_outbound=include)
    table = effective_prefixes(policy)
    for address in asked:
        assert longest_match(table, address) == direct_reading(policy, address)


@repeatable
@given(ranges, ranges)
def test_no_prefix_is_written_twice(exclude: tuple[Network, ...], include: tuple[Network, ...]) -> None:
    policy = CapturePolicy(outbound_all=False, exclude_outbound=exclude, include_outbound=include)
    written = [prefix.network for prefix in effective_prefixes(policy)]
    assert len(written) == len(set(written))


def test_without_ranges_there_is_nothing_to_write() -> None:
    assert prefixes() == []


def test_includes_are_left_out_when_everything_is_included() -> None:
    policy = CapturePolicy(outbound_all=True, include_outbound=(IPv4Network("10.0.0.0/8"),))
    assert effective_prefixes(policy) == ()


def test_an_exclude_beats_a_longer_include() -> None:
    assert prefixes("10.0.0.0/8", "10.1.0.0/16 10.0.0.0/8") == [("10.0.0.0/8", "exclude")]


def test_an_exclude_cuts_a_hole_into_a_shorter_include() -> None:
    assert prefixes("10.1.0.0/16", "10.0.0.0/8 10.2.0.0/16") == [("10.0.0.0/8", "include"), ("10.1.0.0/16", "exclude")]


def test_an_include_within_a_hole_stays_excluded() -> None:
    assert prefixes("10.1.0.0/16", "0.0.0.0/0 10.1.2.0/24") == [("0.0.0.0/0", "include"), ("10.1.0.0/16", "exclude")]


def test_excluding_all_of_ipv4_says_nothing_about_ipv6() -> None:
    assert prefixes("0.0.0.0/0", "10.0.0.0/8 ::/0") == [("0.0.0.0/0", "exclude"), ("::/0", "include")]


def test_ten_thousand_excludes_in_ten_thousand_includes_are_written_once_each() -> None:
    includes = tuple(IPv4Network((10 << 24 | n << 8, 24)) for n in range(10_000))
    excludes = tuple(IPv4Network((10 << 24 | n << 8, 25)) for n in range(10_000))
    policy = CapturePolicy(outbound_all=False, include_outbound=includes * 2, exclude_outbound=excludes)
    assert len(effective_prefixes(policy)) == 20_000
