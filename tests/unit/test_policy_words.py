"""A policy in Istio's words is the same policy when it is read as annotations again."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cni.policy import annotations as istio
from cni.policy.annotations import CapturePolicy, policy_of
from cni.policy.pod import Pod
from installer.commands.pods.policy_words import (
    RUN_AS_GROUP,
    RUN_AS_USER,
    annotations_of,
    as_kept,
    is_default,
    proxy_of,
)

RANGES = ["0.0.0.0/0", "10.0.0.0/8", "10.9.0.0/16", "127.0.0.0/8", "127.0.0.5/1", "127.9.0.1/32", "::1/128", "fd00::/8"]
ranges = st.lists(st.sampled_from(RANGES), max_size=4).map(",".join)
ports = st.lists(st.sampled_from(["0", "22", "80", "15008", "15020", "15090", "65535"]), max_size=4).map(",".join)
values = st.fixed_dictionaries(
    {},
    optional={
        istio.INTERCEPTION_MODE: st.sampled_from(["REDIRECT", "TPROXY"]),
        istio.INCLUDE_OUTBOUND_RANGES: ranges | st.just("*"),
        istio.EXCLUDE_OUTBOUND_RANGES: ranges,
        istio.INCLUDE_OUTBOUND_PORTS: ports,
        istio.EXCLUDE_OUTBOUND_PORTS: ports,
        istio.INCLUDE_INBOUND_PORTS: ports | st.just("*"),
        istio.EXCLUDE_INBOUND_PORTS: ports,
        istio.EXCLUDE_INTERFACES: st.sampled_from(["", "eth1", "eth1,lo", "eth1,eth1"]),
        istio.DENY_OUTBOUND_PORTS: ports,
        istio.DENY_INBOUND_PORTS: ports,
        istio.EARLY_OUTBOUND: st.just("allow"),
        istio.LATE_OUTBOUND: st.just("allow"),
        istio.LIVE_POLICY: st.sampled_from(["true", "false"]),
        istio.STRICT_PROXY: st.sampled_from(["true", "false"]),
        istio.ACCELERATION: st.sampled_from(["off", "proxy", "full"]),
    },
)
environments = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(["true", "0"]) for name in (istio.DNS_CAPTURE, istio.DUAL_STACK)}
)


def policy(annotations: dict[str, str], env: dict[str, str], ids: tuple[int, int] = (1337, 1337)) -> CapturePolicy:
    proxy: dict[str, Any] = {
        "name": "istio-proxy",
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "securityContext": {"runAsUser": ids[0], "runAsGroup": ids[1]},
    }
    metadata = {"name": "pod", "annotations": annotations}
    return policy_of(Pod.model_validate({"metadata": metadata, "spec": {"containers": [proxy]}}))


@given(values, environments, st.sampled_from([(1337, 1337), (1000, 2000), (0, 1337)]))
def test_the_words_give_the_policy_again(
    annotations: dict[str, str], env: dict[str, str], ids: tuple[int, int]
) -> None:
    kept = as_kept(policy(annotations, env, ids))
    proxy, told = proxy_of(kept), annotations_of(kept)
    for name in (istio.EARLY_OUTBOUND, istio.LATE_OUTBOUND):
        if not told[name]:
            del told[name]  # only "allow" is a value
    again = policy(told, proxy, (int(proxy[RUN_AS_USER]), int(proxy[RUN_AS_GROUP])))
    assert annotations_of(as_kept(again)) == annotations_of(kept)
    assert as_kept(again).model_copy(update={"include_outbound": ()}) == kept.model_copy(
        update={"include_outbound": ()}
    )
    assert set(kept.include_outbound) <= set(as_kept(again).include_outbound)


def test_what_no_annotation_says_is_the_default() -> None:
    told = annotations_of(as_kept(policy({}, {}))) | proxy_of(as_kept(policy({}, {})))
    assert all(is_default(name, value) for name, value in told.items())
    assert not is_default(istio.EXCLUDE_OUTBOUND_PORTS, "")


def test_ports_that_are_always_excluded_are_not_repeated() -> None:
    told = annotations_of(as_kept(policy({istio.EXCLUDE_INBOUND_PORTS: "22,15090"}, {})))
    assert told[istio.EXCLUDE_INBOUND_PORTS] == "22"
