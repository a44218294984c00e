"""Istio's annotations: what absent, empty and wrong values mean."""

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.errors import Code, InvalidAnnotation
from cni.policy import annotations
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.pod import Pod

PORT_LISTS = [
    annotations.INCLUDE_OUTBOUND_PORTS,
    annotations.EXCLUDE_OUTBOUND_PORTS,
    annotations.INCLUDE_INBOUND_PORTS,
    annotations.EXCLUDE_INBOUND_PORTS,
]
RANGE_LISTS = [annotations.INCLUDE_OUTBOUND_RANGES, annotations.EXCLUDE_OUTBOUND_RANGES]
INTERFACE_LISTS = [annotations.EXCLUDE_INTERFACES, annotations.REROUTE_INTERFACES, annotations.KUBEVIRT_INTERFACES]
KEYS = [annotations.INTERCEPTION_MODE, *PORT_LISTS, *RANGE_LISTS, *INTERFACE_LISTS]

NO_NUMBERS = ["80-90", "http", "*,80", " *", "0x50", "8_0", "80.0", "8 0"]
NO_PLAIN_NUMBERS = ["-1", "+80", "080", "00", "８０", "\x1c80", "65536", "99999999999999999999"]
NO_PORT_LISTS = ["80,", ",80", "80,,81", ","]
NO_ADDRESSES = ["/8", "10/8", "010.0.0.0/8", "10.0.0.256/8", "example.com/8", "2001:db8:::/32", "1::2::3/64"]
NO_ADDRESSES += ["12345::/16", "::ffff:01.2.3.4/96", "fe80::1%eth0/64", "*,10.0.0.0/8"]
NO_LENGTHS = ["10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0.0/08", "10.0.0.0/８"]
NO_LENGTHS += ["10.0.0.0/255.0.0.0", "10.0.0.0/8/8", "2001:db8::/129", "fe80::/64%eth0"]
NO_RANGE_LISTS = ["10.0.0.0/8, 11.0.0.0/8", " 10.0.0.0/8", "10.0.0.0/8,", ",", " "]

BOOLEAN_VARIABLES = [annotations.DNS_CAPTURE, annotations.DUAL_STACK, annotations.INVALID_DROP]


def pod(values: dict[str, str] | None = None, **proxy: Any) -> Pod:
    return Pod.model_validate(
        {
            "metadata": {"name": "app", "annotations": values},
            "spec": {"containers": [{"name": "app"}, {"name": "istio-proxy", **proxy}]},
        }
    )


def policy(key: str, text: str) -> CapturePolicy:
    return policy_of(pod({key: text}))


def refusal(key: str, text: str) -> str:
    with pytest.raises(InvalidAnnotation) as caught:
        policy(key, text)
    assert caught.value.code == Code.INVALID_ANNOTATION
    return str(caught.value)


def env(name: str, value: str | None) -> Pod:
    return pod(env=[{"name": name, "value": value}])


def test_a_pod_without_annotations_gets_istios_defaults() -> None:
    assert policy_of(pod()) == CapturePolicy(
        mode="REDIRECT",
        outbound_all=True,
        include_outbound=(),
        exclude_outbound=(),
        include_outbound_ports=frozenset(),
        exclude_outbound_ports=frozenset({15020}),
        inbound_all=True,
        include_inbound_ports=frozenset(),
        exclude_inbound_ports=frozenset({15020, 15021, 15090}),
        proxy_uid=1337,
        proxy_gid=1337,
        dns_capture=False,
        dual_stack=False,
        invalid_drop=False,
        loopback_included=False,
    )


def test_a_policy_without_arguments_is_that_of_a_pod_without_annotations() -> None:
    assert CapturePolicy() == policy_of(pod())


def test_what_the_injector_writes_by_default_changes_nothing() -> None:
    injected = {
        annotations.INTERCEPTION_MODE: "REDIRECT",
        annotations.INCLUDE_INBOUND_PORTS: "*",
        annotations.EXCLUDE_INBOUND_PORTS: "15020",
        annotations.INCLUDE_OUTBOUND_RANGES: "*",
        "sidecar.istio.io/status": "{}",
        "status.sidecar.istio.io/port": "not read",
    }
    assert policy_of(pod(injected)) == policy_of(pod())


def test_empty_included_ranges_capture_nothing_outbound() -> None:
    empty = policy(annotations.INCLUDE_OUTBOUND_RANGES, "")
    assert (empty.outbound_all, empty.include_outbound) == (False, ())


def test_empty_included_inbound_ports_capture_nothing_inbound() -> None:
    empty = policy(annotations.INCLUDE_INBOUND_PORTS, "")
    assert (empty.inbound_all, empty.include_inbound_ports) == (False, frozenset())


def test_ports_are_numbers_between_commas_with_space_around_them() -> None:
    listed = policy(annotations.INCLUDE_INBOUND_PORTS, " 80, 0 ,\t65535,80\t")
    assert listed.include_inbound_ports == {80, 0, 65535}
    assert not listed.inbound_all


# Istio's own check trims these, and iptables-restore then refuses the rule that the text stands in
@pytest.mark.parametrize("text", [" ", "\t", "\n", "80\n", "80,\n81", "80\r", "80\u00a0", "80, ,81"])
@pytest.mark.parametrize("key", [key for key in PORT_LISTS if key != annotations.EXCLUDE_INBOUND_PORTS])
def test_ports_that_iptables_would_not_read_are_refused(key: str, text: str) -> None:
    assert "is not a port" in refusal(key, text)


@pytest.mark.parametrize(("text", "ports"), [(" ", set()), ("80\n", {80}), ("\n80 ,81\u00a0", {80, 81})])
def test_the_list_that_istio_trims_may_have_any_space_around_it(text: str, ports: set[int]) -> None:
    excluded = policy(annotations.EXCLUDE_INBOUND_PORTS, text).exclude_inbound_ports
    assert excluded == ports | annotations.ALWAYS_EXCLUDED_INBOUND
    assert "is not a port" in refusal(annotations.EXCLUDE_INBOUND_PORTS, "80,\n81")


@pytest.mark.parametrize("text", ["", "443"])
def test_the_status_port_is_captured_once_excluded_outbound_ports_are_given_without_it(text: str) -> None:
    assert 15020 not in policy(annotations.EXCLUDE_OUTBOUND_PORTS, text).exclude_outbound_ports


@pytest.mark.parametrize("text", ["", "443"])
def test_status_health_and_telemetry_ports_are_always_excluded_inbound(text: str) -> None:
    assert policy(annotations.EXCLUDE_INBOUND_PORTS, text).exclude_inbound_ports >= {15020, 15021, 15090}


@pytest.mark.parametrize("key", PORT_LISTS)
@pytest.mark.parametrize(
    "text",
    [*NO_NUMBERS, *NO_PLAIN_NUMBERS, *NO_PORT_LISTS],
)
def test_what_is_no_port_is_refused(key: str, text: str) -> None:
    assert "is not a port; give ports 0–65535 separated by commas" in refusal(key, text)


@pytest.mark.parametrize("key", [key for key in PORT_LISTS if key != annotations.INCLUDE_INBOUND_PORTS])
def test_a_star_is_refused_where_iptables_would_not_take_it(key: str) -> None:
    assert '"*" is not a port' in refusal(key, "*")


def test_a_refusal_names_annotation_value_and_what_would_be_right() -> None:
    assert refusal(annotations.EXCLUDE_OUTBOUND_PORTS, "443,80-90") == (
        'traffic.sidecar.istio.io/excludeOutboundPorts: "80-90" is not a port; give ports 0–65535 separated by commas'
    )
    assert refusal(annotations.INCLUDE_OUTBOUND_RANGES, "10.0.0.1").endswith(', or "*" alone')


def test_a_refusal_of_a_huge_value_stays_readable() -> None:
    assert len(refusal(annotations.EXCLUDE_OUTBOUND_PORTS, "x" * 100_000)) < 300


def test_ranges_lose_their_host_bits() -> None:
    listed = policy(annotations.INCLUDE_OUTBOUND_RANGES, "10.1.2.3/8,2001:db8::1/32,0.0.0.0/0,192.0.2.1/32")
    assert listed.include_outbound == tuple(
        map(ip_network, ("10.0.0.0/8", "2001:db8::/32", "0.0.0.0/0", "192.0.2.1/32"))
    )
    assert not listed.outbound_all


def test_a_mapped_range_stays_an_ipv6_range() -> None:
    listed = policy(annotations.EXCLUDE_OUTBOUND_RANGES, "::ffff:1.2.3.4/96")
    assert listed.exclude_outbound == (ip_network("::ffff:0:0/96"),)


@pytest.mark.parametrize("key", RANGE_LISTS)
@pytest.mark.parametrize(
    "text",
    [*NO_ADDRESSES, *NO_LENGTHS, *NO_RANGE_LISTS],
)
def test_what_is_no_range_is_refused(key: str, text: str) -> None:
    assert "is not an IP range" in refusal(key, text)


def test_everything_cannot_be_excluded_by_a_star() -> None:
    assert '"*" is not an IP range' in refusal(annotations.EXCLUDE_OUTBOUND_RANGES, "*")


@pytest.mark.parametrize(
    ("ranges", "included"),
    [
        ("127.0.0.0/8", True),
        ("10.0.0.0/8,127.0.0.1/32", True),
        ("127.0.0.1/0", True),
        ("::1/128", True),
        ("::ffff:127.0.0.1/104", True),
        ("0.0.0.0/0", False),
        ("::/0", False),
        ("126.0.0.0/7", False),
        ("*", False),
        ("", False),
    ],
)
def test_loopback_is_included_when_a_range_is_written_with_a_loopback_address(ranges: str, included: bool) -> None:
    assert policy(annotations.INCLUDE_OUTBOUND_RANGES, ranges).loopback_included is included


def test_an_excluded_loopback_range_does_not_include_loopback() -> None:
    assert not policy(annotations.EXCLUDE_OUTBOUND_RANGES, "127.0.0.0/8").loopback_included


@pytest.mark.parametrize("text", ["NONE", "", "redirect", "REDIRECT ", "tproxy"])
def test_modes_other_than_istios_two_are_refused(text: str) -> None:
    assert "is not an interception mode" in refusal(annotations.INTERCEPTION_MODE, text)


@pytest.mark.parametrize("key", [annotations.EXCLUDE_INTERFACES, annotations.REROUTE_INTERFACES])
@pytest.mark.parametrize("text", ["0eth", "eth+", "a" * 16, "eth0,", " ", "eth0 eth1", "_x", "eth0\n,é", "eth0\n", "*"])
def test_what_is_no_interface_name_is_refused(key: str, text: str) -> None:
    assert "is not an interface name" in refusal(key, text)


def test_tproxy_dns_capture_and_excluded_interfaces_are_taken() -> None:
    assert policy(annotations.INTERCEPTION_MODE, "TPROXY").mode == "TPROXY"
    assert policy(annotations.EXCLUDE_INTERFACES, "eth1, net1.2_a-b").exclude_interfaces == ("eth1", "net1.2_a-b")
    assert policy_of(env(annotations.DNS_CAPTURE, "true")).dns_capture


@pytest.mark.parametrize("key", [annotations.REROUTE_INTERFACES, annotations.KUBEVIRT_INTERFACES])
def test_virtual_interfaces_are_refused_with_what_to_do(key: str) -> None:
    message = refusal(key, "eth1, net1")
    assert key in message
    assert '"eth1,net1"' in message
    assert "Remove the annotation" in message


def test_late_outbound_is_off_unless_allowed() -> None:
    assert not policy_of(pod()).late_outbound
    assert policy(annotations.LATE_OUTBOUND, "allow").late_outbound
    for text in ("", "true", "Allow"):
        assert "give allow, or remove it" in refusal(annotations.LATE_OUTBOUND, text)


@pytest.mark.parametrize(
    ("text", "default", "expected"), [(None, True, True), ("false", True, False), ("1", False, True)]
)
def test_the_pods_word_on_live_policies_beats_the_nodes(text: str | None, default: bool, expected: bool) -> None:
    said = pod({} if text is None else {annotations.LIVE_POLICY: text})
    assert policy_of(said, live=default).live is expected
    assert "give true or false" in refusal(annotations.LIVE_POLICY, "perhaps")


def test_early_outbound_is_off_unless_allowed() -> None:
    assert not policy_of(pod()).early_outbound
    assert policy(annotations.EARLY_OUTBOUND, "allow").early_outbound
    for text in ("", "true", "Allow", "allow "):
        assert "give allow, or remove it" in refusal(annotations.EARLY_OUTBOUND, text)


def test_a_strict_proxy_is_a_boolean() -> None:
    assert not policy_of(pod()).strict_proxy
    assert policy(annotations.STRICT_PROXY, "true").strict_proxy
    assert not policy(annotations.STRICT_PROXY, "false").strict_proxy
    for text in ("", "yes", "tRUE"):
        assert "give true or false" in refusal(annotations.STRICT_PROXY, text)


@pytest.mark.parametrize("key", INTERFACE_LISTS)
def test_empty_interface_lists_ask_for_nothing(key: str) -> None:
    assert policy(key, "") == CapturePolicy()


def test_the_newer_name_for_rerouted_interfaces_hides_the_older_one_even_when_empty() -> None:
    both = {annotations.REROUTE_INTERFACES: "", annotations.KUBEVIRT_INTERFACES: "0 not looked at"}
    assert policy_of(pod(both)) == CapturePolicy()


@pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True"])
def test_true_as_go_spells_it_is_true(value: str) -> None:
    assert policy_of(env(annotations.DUAL_STACK, value)).dual_stack
    assert policy_of(env(annotations.INVALID_DROP, value)).invalid_drop


@pytest.mark.parametrize("value", ["0", "f", "F", "FALSE", "false", "False", "", "yes", "on", "tRUE", " true", None])
@pytest.mark.parametrize("name", BOOLEAN_VARIABLES)
def test_anything_else_in_the_environment_is_false(name: str, value: str | None) -> None:
    assert policy_of(env(name, value)) == CapturePolicy()


def test_the_last_of_several_entries_of_a_variable_counts() -> None:
    entries = [{"name": annotations.DUAL_STACK, "value": "true"}, {"name": annotations.DUAL_STACK, "value": "false"}]
    assert not policy_of(pod(env=entries)).dual_stack


def test_the_environment_of_other_containers_does_not_count() -> None:
    app = {"name": "app", "env": [{"name": annotations.DNS_CAPTURE, "value": "true"}]}
    manifest = {"metadata": {"name": "app"}, "spec": {"containers": [app, {"name": "istio-proxy"}]}}
    assert policy_of(Pod.model_validate(manifest)) == CapturePolicy()


def test_a_proxy_among_the_init_containers_is_read_too() -> None:
    proxy = {"name": "istio-proxy", "securityContext": {"runAsUser": 2000, "runAsGroup": 3000}}
    native = Pod.model_validate({"metadata": {"name": "app"}, "spec": {"initContainers": [proxy], "containers": None}})
    assert (policy_of(native).proxy_uid, policy_of(native).proxy_gid) == (2000, 3000)


def test_a_proxy_that_runs_as_root_is_known_by_the_usual_ids() -> None:
    root = policy_of(pod(securityContext={"runAsUser": 0, "runAsGroup": 1337}))
    assert (root.proxy_uid, root.proxy_gid) == (1337, 1337)


def test_the_pods_own_security_context_is_not_read() -> None:
    manifest = {"metadata": {"name": "app"}, "spec": {"securityContext": {"runAsUser": 5}, "containers": []}}
    assert policy_of(Pod.model_validate(manifest)).proxy_uid == 1337


def test_ten_thousand_ports_and_ranges_are_taken() -> None:
    ranges = ",".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(10_000))
    long = policy_of(
        pod(
            {
                annotations.EXCLUDE_OUTBOUND_RANGES: ranges,
                annotations.EXCLUDE_OUTBOUND_PORTS: ",".join(map(str, range(10_000))),
            }
        )
    )
    assert (len(long.exclude_outbound), len(long.exclude_outbound_ports)) == (10_000, 10_000)


repeatable = settings(derandomize=True, deadline=None)
list_like = st.text(alphabet="0123456789abf.:/,*-+ %e", max_size=40)


@repeatable
@given(st.dictionaries(st.sampled_from(KEYS), st.text() | list_like, max_size=4))
def test_any_text_gives_a_policy_or_a_refusal(values: dict[str, str]) -> None:
    try:
        got = policy_of(pod(values))
    except InvalidAnnotation as error:
        assert any(key in str(error) for key in values)
    else:
        assert got.exclude_inbound_ports >= annotations.ALWAYS_EXCLUDED_INBOUND


@repeatable
@given(st.frozensets(st.integers(0, 65535)), st.sampled_from(["", " ", "\t"]))
def test_every_list_of_ports_is_read_back(ports: frozenset[int], space: str) -> None:
    text = ",".join(f"{space}{port}{space}" for port in ports)
    assert policy(annotations.EXCLUDE_OUTBOUND_PORTS, text).exclude_outbound_ports == ports
