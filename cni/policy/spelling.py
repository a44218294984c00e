"""Finds misspelt annotations. Istio ignores an annotation that it does not know, and so does sidestep."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from cni.policy import annotations as istio
from cni.policy.ambient_annotations import BYPASS_INBOUND, DNS_CAPTURE
from cni.policy.membership import INJECT, STATUS

_OF_TRAFFIC, _OF_SIDECAR, _OF_SIDESTEP = "traffic.sidecar.istio.io", "sidecar.istio.io", "sidestep.io"
# every annotation that has an effect on capture
_CAPTURING = (
    istio.INTERCEPTION_MODE,
    istio.INCLUDE_OUTBOUND_RANGES,
    istio.EXCLUDE_OUTBOUND_RANGES,
    istio.INCLUDE_OUTBOUND_PORTS,
    istio.EXCLUDE_OUTBOUND_PORTS,
    istio.INCLUDE_INBOUND_PORTS,
    istio.EXCLUDE_INBOUND_PORTS,
    istio.EXCLUDE_INTERFACES,
    istio.REROUTE_INTERFACES,
    istio.KUBEVIRT_INTERFACES,
    istio.EARLY_OUTBOUND,
    istio.LATE_OUTBOUND,
    istio.STRICT_PROXY,
    istio.ACCELERATION,
    istio.DENY_OUTBOUND_PORTS,
    istio.DENY_INBOUND_PORTS,
    istio.UNCAPTURED,
    istio.LIVE_POLICY,
    BYPASS_INBOUND,
    DNS_CAPTURE,
    INJECT,
    STATUS,
)
# Istio's other annotations below sidecar.istio.io (istio.io/api, annotation/annotations.gen.go, Istio 1.31). Another
# name may be a later Istio's. So below that domain only what looks like one of _CAPTURING is misspelt.
_OTHERS = frozenset(
    f"{_OF_SIDECAR}/{name}"
    for name in (
        "agentLogLevel",
        "bootstrapOverride",
        "componentLogLevel",
        "discoveryAddress",
        "extraStatTags",
        "logLevel",
        "nativeSidecar",
        "proxyCPU",
        "proxyCPULimit",
        "proxyImage",
        "proxyImageType",
        "proxyMemory",
        "proxyMemoryLimit",
        "rewriteAppHTTPProbers",
        "statsCompression",
        "statsEvictionInterval",
        "statsFlushInterval",
        "statsHistogramBins",
        "statsHistogramBuckets",
        "statsInclusionPrefixes",
        "statsInclusionRegexps",
        "statsInclusionSuffixes",
        "userVolume",
        "userVolumeMount",
    )
)
_CLOSE = 0.8  # difflib's ratio from which on a name is taken for another


class Misspelt(NamedTuple):
    """An annotation that nobody knows. `meant` is the one that it looks like; "" if it looks like none."""

    name: str
    meant: str

    def __str__(self) -> str:
        meant = self.meant
        if not meant:
            return f"unknown annotation {self.name}"
        is_same_domain = self.name.rpartition("/")[0] == meant.rpartition("/")[0]
        return f"unknown annotation {self.name}, did you mean {meant.rpartition('/')[2] if is_same_domain else meant}"


def misspelt(names: Iterable[str]) -> Iterator[Misspelt]:
    """The misspelt ones among the names of a Pod's annotations."""
    for name in sorted(names):
        domain, _, last = name.rpartition("/")
        if name in _CAPTURING or name in _OTHERS or not domain.endswith(("istio.io", _OF_SIDESTEP)):
            continue
        meant = _meant(name, domain, last)
        if meant or domain in (_OF_TRAFFIC, _OF_SIDESTEP):
            yield Misspelt(name, meant)


def _meant(name: str, domain: str, last: str) -> str:
    """The annotation that a name looks like: the same in another domain, or almost the same in this one."""
    by_last = {each.rpartition("/")[2].lower(): each for each in _CAPTURING}
    if last.lower() in by_last and (domain != _OF_SIDECAR or by_last[last.lower()].startswith(_OF_TRAFFIC)):
        return by_last[last.lower()]
    same = [each for each in _CAPTURING if each.rpartition("/")[0] == domain]
    lasts = {each.rpartition("/")[2].lower(): each for each in (same or _CAPTURING)}
    close = get_close_matches(last.lower(), lasts, 1, _CLOSE)
    return lasts[close[0]] if close else ""
