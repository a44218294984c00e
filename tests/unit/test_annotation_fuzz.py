"""Any text in any annotation gives a policy or one helpful line; what is accepted is what Istio and iptables accept.

The grammar below is Istio's, stated again without looking at cni/policy/annotations.py: Go's strings.TrimSpace, Split
and ParseUint(…, 10, 16), net/netip's ParsePrefix, and the interface pattern of Istio's CNI plugin. HYPOTHESIS_EXAMPLES
sets how many texts are tried a test.
"""

import json
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cni.errors import InvalidAnnotation
from cni.policy import annotations
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.pod import Pod

PORTS = [
    annotations.INCLUDE_OUTBOUND_PORTS,
    annotations.EXCLUDE_OUTBOUND_PORTS,
    annotations.INCLUDE_INBOUND_PORTS,
    annotations.EXCLUDE_INBOUND_PORTS,
]
RANGES = [annotations.INCLUDE_OUTBOUND_RANGES, annotations.EXCLUDE_OUTBOUND_RANGES]
INTERFACES = [annotations.EXCLUDE_INTERFACES, annotations.REROUTE_INTERFACES, annotations.KUBEVIRT_INTERFACES]
OTHERS = [annotations.INTERCEPTION_MODE, annotations.EARLY_OUTBOUND, annotations.STRICT_PROXY]
KEYS = [*PORTS, *RANGES, *INTERFACES, *OTHERS]
VARIABLES = [annotations.DNS_CAPTURE, annotations.DUAL_STACK, annotations.INVALID_DROP]
WITH_WILDCARD = [annotations.INCLUDE_OUTBOUND_RANGES, annotations.INCLUDE_INBOUND_PORTS]
LONGEST_MESSAGE = 500

# ---- what Istio accepts ----------------------------------------------------------------------------------------------

OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = re.compile(rf"{OCTET}(?:\.{OCTET}){{3}}")
GROUP = re.compile(r"[0-9A-Fa-f]{1,4}")


def trimmed(text: str) -> str:
    """strings.TrimSpace: unicode.IsSpace is the separators and six controls."""
    start, end = 0, len(text)
    while start < end and is_space(text[start]):
        start += 1
    while end > start and is_space(text[end - 1]):
        end -= 1
    return text[start:end]


def is_space(char: str) -> bool:
    return unicodedata.category(char)[0] == "Z" or char in "\t\n\v\f\r\x85"


def is_number(text: str, maximum: int) -> bool:
    """Digits only, at most `maximum`; leading zeros are for the caller to judge."""
    return re.fullmatch("[0-9]+", text) is not None and len(text.lstrip("0")) <= 5 and int(text[-9:]) <= maximum


def groups(text: str, ipv4_may_end: bool) -> int:
    """How many 16-bit groups a part of an IPv6 address is; 99 when it is none."""
    if not text:
        return 0
    *parts, last = text.split(":")
    if not all(GROUP.fullmatch(part) for part in parts):
        return 99
    if ipv4_may_end and IPV4.fullmatch(last):
        return len(parts) + 2
    return len(parts) + 1 if GROUP.fullmatch(last) else 99


def is_ipv6(text: str) -> bool:
    if "::" not in text:
        return groups(text, ipv4_may_end=True) == 8
    before, _, after = text.partition("::")
    return groups(before, ipv4_may_end=False) + groups(after, ipv4_may_end=True) <= 7


def is_prefix(text: str) -> bool:
    """netip.ParsePrefix: no zone, no leading zero or sign in the length, bits to the right of it allowed."""
    address, slash, length = text.rpartition("/")
    if not slash or (len(length) > 1 and length[0] == "0"):
        return False
    if IPV4.fullmatch(address):
        return is_number(length, 32)
    return is_ipv6(address) and is_number(length, 128)


def is_port(text: str) -> bool:
    return is_number(text, 65535)


def is_interface(text: str) -> bool:
    return len(text) <= 15 and re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-]*", text) is not None


def istio_accepts(key: str, text: str) -> bool:
    """The annotation's check in Istio's CNI plugin."""
    if key in PORTS:
        # all four take "*" in Istio's check
        return text == "*" or not trimmed(text) or all(is_port(trimmed(each)) for each in trimmed(text).split(","))
    if key in RANGES:
        wildcard = text == "*" and key in WITH_WILDCARD
        return wildcard or not text or all(is_prefix(each) for each in text.split(","))
    return not text or all(is_interface(trimmed(each)) for each in text.split(","))


def iptables_accepts(key: str, text: str) -> bool:
    """What comes after the check: iptables-restore takes no "*" where Istio writes the list down, and no 080.

    It gets the text of each element between two blanks in a line of its input. Istio trims one list before.
    """
    if key in RANGES:
        return True
    if key in INTERFACES:
        return "\n" not in text
    if text == "*":
        return key in WITH_WILDCARD
    text = trimmed(text) if key == annotations.EXCLUDE_INBOUND_PORTS else text
    return not text or all(is_port_of_iptables(each) for each in text.split(","))


def is_port_of_iptables(text: str) -> bool:
    """One word of a line, read by strtoul(): it skips space before the digits, but none may be left behind them."""
    line, *more = text.split("\n")
    words = re.split("[ \t]+", line.strip(" \t"))
    return not more and len(words) == 1 and re.fullmatch("[\v\f\r]*(0|[1-9][0-9]*)", words[0]) is not None


# ---- texts -----------------------------------------------------------------------------------------------------------

spaces = st.text(alphabet=" \t\n\v\f\r\x85\xa0\u1680\u2003\u2028\u202f\u3000\x1c\x1f\u200b\ufeff", max_size=2)
numbers = st.integers(0, 65535) | st.integers(0, 70000) | st.integers() | st.sampled_from([65535, 65536, 0, 15020])
ports = st.builds("{}{}".format, st.sampled_from(["", "", "", "", "0", "+", "-", "0x"]), numbers)
lengths = (
    st.integers(0, 32).map(str) | st.integers(0, 140).map(str) | st.sampled_from(["08", "+8", "", "-1", "８", "00"])
)
addresses = (
    st.ip_addresses().map(str)
    | st.ip_addresses(v=6).map(lambda ip: ip.exploded)
    | st.ip_addresses(v=6).map(lambda ip: str(ip).upper())
    | st.ip_addresses(v=4).map(lambda ip: f"::ffff:{ip}")
    | st.builds(
        "{}:{}".format,
        st.sampled_from(["1:2:3:4:5:6", "::6", "1::", "1:2:3:4:5", "::1:2:3:4:5:6"]),
        st.ip_addresses(v=4),
    )
    | st.lists(st.sampled_from(["", "0", "1", "abcd", "00001", "1.2.3.4"]), min_size=2, max_size=9).map(":".join)
    | st.lists(st.integers(0, 260).map(str) | st.just("01"), min_size=3, max_size=5).map(".".join)
)
prefixes = st.builds("{}{}{}".format, addresses, st.sampled_from(["/", "/", "/", "/", "", "//", "%1/"]), lengths)
names = st.text(alphabet="abzAZ09_.-", min_size=1, max_size=17) | st.sampled_from(["eth0", "net1", "lo", "eth+", "é0"])


def lists_of(elements: st.SearchStrategy[str], space: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Lists as one could write them by mistake."""
    padded = st.builds("{}{}{}".format, space, elements, space)
    texts = st.lists(padded, max_size=4).map(",".join)
    return texts | st.builds(damaged, texts, st.integers(0, 99), st.sampled_from([*",/:.*%-0 \n", "", "٣"]))


def damaged(text: str, position: int, char: str) -> str:
    """One character replaced, or left out."""
    at = position % (len(text) + 1)
    return text[:at] + char + text[at + 1 :]


rare_space = st.just("") | st.just("") | st.just("") | spaces
port_lists = lists_of(ports, st.just("") | spaces) | st.sampled_from(["*", " *", "*,80", "", " ", ","])
range_lists = lists_of(prefixes, rare_space) | st.sampled_from(["*", "*,10.0.0.0/8", "", " ", ","])
name_lists = lists_of(names, st.just("") | spaces) | st.sampled_from(["*", "", " ", ","])
KINDS = [(key, port_lists) for key in PORTS] + [(key, range_lists) for key in RANGES]
KINDS += [(key, name_lists) for key in INTERFACES]
any_text = st.text() | port_lists | range_lists | name_lists | st.sampled_from(["TPROXY", "REDIRECT", "allow", "true"])
any_id = st.none() | st.integers(0, 2**31 - 1)


def pod(values: dict[str, str], env: dict[str, str | None] | None = None, **ids: int | None) -> Pod:
    variables = [{"name": name, "value": value} for name, value in (env or {}).items()]
    proxy: dict[str, Any] = {"name": "istio-proxy", "env": variables, "securityContext": ids}
    return Pod.model_validate(
        {"metadata": {"name": "app", "annotations": values}, "spec": {"containers": [{"name": "app"}, proxy]}}
    )


def refusal(values: dict[str, str]) -> str | None:
    """The message, checked to be one that helps; None when there is a policy."""
    try:
        assert isinstance(policy_of(pod(values)), CapturePolicy)
    except InvalidAnnotation as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message and "\r" not in message
    named = [key for key in values if message.startswith(key)]
    # the newer of two names stands for both
    named += [key for key in values if key in INTERFACES and message.startswith(annotations.REROUTE_INTERFACES)]
    assert named, message
    assert_quotes(message, [values[key] for key in named])
    assert re.search(r"; give |Remove the annotation, or ", message), message
    return message


def assert_quotes(message: str, values: list[str]) -> None:
    """A piece of the value stands in quotes, whole or cut with an ellipsis."""
    quoted, _ = json.JSONDecoder(strict=False).raw_decode(message, message.index('"'))
    if quoted.endswith("…") and len(quoted) > 80:
        assert any(quoted[:-1] in value for value in values), message
        return
    whole = [each for value in values for each in (value, *value.split(","), *trimmed(value).split(","))]
    # of interface names that are all valid the list is shown, tidied
    whole += [",".join(map(trimmed, value.split(","))) for value in values]
    assert any(quoted in (each, trimmed(each)) for each in whole), message


# ---- tests -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(KEYS), any_text, max_size=4))
def test_any_annotations_give_a_policy_or_one_helpful_line(values: dict[str, str]) -> None:
    refusal(values)


@pytest.mark.parametrize(("key", "texts"), KINDS, ids=[key.rpartition("/")[2] for key, _ in KINDS])
@given(st.data())
def test_what_istio_and_iptables_accept_is_accepted(
    key: str, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(texts)
    accepted = istio_accepts(key, text) and iptables_accepts(key, text)
    message = refusal({key: text})
    if key in INTERFACES[1:] and accepted and text:
        # what a virtual machine sends can't be captured, and is refused on other grounds
        assert message is not None and "asks to capture the packets" in message
    else:
        assert (message is None) == accepted, message


@given(st.dictionaries(st.sampled_from(VARIABLES), st.none() | st.text() | st.sampled_from("1tTfF0"), max_size=3))
def test_any_environment_gives_a_policy(env: dict[str, str | None]) -> None:
    policy = policy_of(pod({}, env))
    wanted = [env.get(name) in ("1", "t", "T", "TRUE", "true", "True") for name in VARIABLES]
    assert [policy.dns_capture, policy.dual_stack, policy.invalid_drop] == wanted


@given(any_id, any_id)
def test_any_ids_a_pod_can_have_give_a_policy(uid: int | None, gid: int | None) -> None:
    policy = policy_of(pod({}, runAsUser=uid, runAsGroup=gid))
    assert (policy.proxy_uid, policy.proxy_gid) == (uid or 1337, gid or 1337)


@given(st.integers(max_value=-1) | st.integers(min_value=2**31))
def test_ids_that_kubernetes_refuses_are_no_pod(number: int) -> None:
    for ids in ((number, None), (None, number)):
        with pytest.raises(ValidationError):
            pod({}, runAsUser=ids[0], runAsGroup=ids[1])


LONG_LISTS = [(key, [str(n) for n in range(10_000)]) for key in PORTS]
LONG_LISTS += [(key, [f"10.{n >> 8}.{n & 255}.0/24" for n in range(5_000)] * 2) for key in RANGES]
LONG_LISTS += [(key, [f"2001:db8:{n:x}::/48" for n in range(10_000)]) for key in RANGES]
LONG_LISTS += [(key, [f"net{n}" for n in range(10_000)]) for key in INTERFACES[:1]]


@pytest.mark.parametrize(("key", "elements"), LONG_LISTS)
@settings(max_examples=max(3, settings().max_examples // 50))
@given(position=st.integers(0, 9_999), bad=st.sampled_from(["x" * 100_000, "", "1" * 5_000, "-1", "é", "10.0.0.0/33"]))
def test_ten_thousand_elements_are_taken_and_one_bad_one_is_found(
    key: str, elements: list[str], position: int, bad: str
) -> None:
    assert refusal({key: ",".join(elements)}) is None
    message = refusal({key: ",".join([*elements[:position], bad, *elements[position:]])})
    assert message is not None
    assert len(message) < LONGEST_MESSAGE


@pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029", "\x9b", "\x7f", "\u202e"])
def test_a_refusal_is_one_line_of_printable_text_whatever_was_written(char: str) -> None:
    message = refusal({annotations.EXCLUDE_OUTBOUND_PORTS: f"80{char}80"})
    assert message is not None
    assert message.isprintable()


def test_a_refusal_of_many_virtual_interfaces_is_short() -> None:
    message = refusal({annotations.REROUTE_INTERFACES: ",".join(f"net{n}" for n in range(10_000))})
    assert message is not None
    assert len(message) < LONGEST_MESSAGE
