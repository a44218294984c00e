"""Our place in a CNI configuration: last, once, under the network's own name, and out again without a trace."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from installer.host import chain
from installer.host.chain import Conf, InvalidConf
from installer.settings import Node

ENTRY = chain.entry_of(Node(pod_namespace="istio-system", exclude_namespaces=("kube-system",)))
BRIDGE: dict[str, Any] = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local"}}


def listed(*plugins: dict[str, Any], **keys: Any) -> Conf:
    return Conf("10-a.conflist", {"cniVersion": "1.0.0", "name": "net", "plugins": list(plugins), **keys})


def test_the_plugin_is_told_of_ambient_mode_by_istios_key_and_only_then() -> None:
    assert "ambient_enabled" not in ENTRY
    assert chain.entry_of(Node(ambient_enabled=True))["ambient_enabled"] is True


def test_the_entry_tells_the_runtime_what_to_pass() -> None:
    assert ENTRY == {
        "type": "sidestep-cni",
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "cgroupPath": True},
        "cni_agent_run_dir": "/run/sidestep",
        "agent_timeout_seconds": 10.0,
        "pod_namespace": "istio-system",
        "exclude_namespaces": ["kube-system"],
    }


def test_it_comes_last_and_the_rest_stays() -> None:
    conf = listed(BRIDGE, {"type": "portmap"}, disableCheck=True)
    assert chain.with_plugin(conf, ENTRY).document == {
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [BRIDGE, {"type": "portmap"}, ENTRY],
        "disableCheck": True,
    }


def test_duplicates_of_ours_and_istios_plugin_go() -> None:
    conf = listed({"type": "istio-cni"}, BRIDGE, ENTRY, {"type": "portmap"}, {**ENTRY, "pod_namespace": "old"})
    assert chain.with_plugin(conf, ENTRY).document["plugins"] == [BRIDGE, {"type": "portmap"}, ENTRY]
    assert chain.replaced_types(conf) == ["istio-cni"]


def test_an_entry_with_other_options_is_brought_up_to_date() -> None:
    conf = listed(BRIDGE, {**ENTRY, "exclude_namespaces": []})
    assert chain.with_plugin(conf, ENTRY) != conf
    assert chain.with_plugin(listed(BRIDGE, ENTRY), ENTRY) == listed(BRIDGE, ENTRY)


@pytest.mark.parametrize("file", ["10-a.conf", "10-a.json"])
def test_a_single_plugin_becomes_a_list_under_its_own_name(file: str) -> None:
    conf = Conf(file, {"cniVersion": "0.4.0", "name": "mynet", **BRIDGE})
    made = chain.with_plugin(conf, ENTRY)
    assert made.file == "10-a.conflist"
    assert (made.document["name"], made.document["cniVersion"]) == ("mynet", "0.4.0")
    assert made.document["plugins"][0] == BRIDGE
    assert chain.without_plugin(made) == conf


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", None])
def test_a_version_too_old_for_chains_is_raised_and_comes_back(version: str | None) -> None:
    head = {"cniVersion": version} if version else {}
    conf = Conf("10-a.conf", {**head, "name": "mynet", **BRIDGE})
    made = chain.with_plugin(conf, ENTRY)
    assert made.document["cniVersion"] == "0.3.1"
    assert chain.without_plugin(made) == conf


def test_a_network_without_name_gets_the_one_that_the_runtime_gives_it() -> None:
    conf = Conf("10-a.conf", {"cniVersion": "0.4.0", **BRIDGE})
    made = chain.with_plugin(conf, ENTRY)
    assert made.document["name"] == "10-a.conf"
    assert chain.without_plugin(made) == conf


@pytest.mark.parametrize("version", ["0.2.0", "0.3.0", None])
def test_a_list_older_than_the_plugin_is_raised_and_comes_back(version: str | None) -> None:
    conf = Conf("10-a.conflist", {"name": "net", "plugins": [BRIDGE]})
    if version:
        conf.document["cniVersion"] = version
    assert chain.is_raised(conf)
    made = chain.with_plugin(conf, ENTRY)
    assert made.document["cniVersion"] == "0.3.1"
    assert chain.with_plugin(made, ENTRY) == made
    assert chain.without_plugin(made) == conf


@pytest.mark.parametrize(
    ("plugins", "fault"),
    [
        ([BRIDGE, ENTRY], ""),
        ([BRIDGE], "entry missing"),
        ([BRIDGE, {**ENTRY, "pod_namespace": "x"}], "entry changed"),
        ([BRIDGE, ENTRY, {"type": "portmap"}], "entry not last"),
        ([BRIDGE, ENTRY, ENTRY], "more than one entry"),
        ([BRIDGE, {"type": "istio-cni"}, ENTRY], "another capturing plugin in the chain"),
    ],
)
def test_what_is_wrong_has_a_name(plugins: list[dict[str, Any]], fault: str) -> None:
    assert chain.fault_of_list(listed(*plugins), ENTRY) == fault


def test_a_version_that_somebody_has_chosen_since_stays() -> None:
    made = chain.with_plugin(Conf("10-a.conflist", {"cniVersion": "0.3.0", "name": "net", "plugins": [BRIDGE]}), ENTRY)
    made.document["cniVersion"] = "1.0.0"
    left = chain.without_plugin(made)
    assert left is not None
    assert left.document["cniVersion"] == "1.0.0"


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"cniVersion": "2.0.0"}, "10-a.conflist has cniVersion 2.0.0; sidestep-cni speaks 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
        ({"cniVersion": "new"}, "10-a.conflist has cniVersion new; sidestep-cni speaks 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
        ({"cniVersion": "2.0.0", "cniVersions": ["1.1.0", "2.0.0"]}, ""),
        ({"cniVersion": "0.3.0"}, ""),
        ({"cniVersion": "1.1.0"}, ""),
        ({}, ""),
    ],
)
def test_versions_that_the_plugin_does_not_speak_are_named(versions: dict[str, Any], problem: str) -> None:
    assert chain.unsupported(Conf("10-a.conflist", {**versions, "name": "net", "plugins": [BRIDGE]})) == problem


def test_a_wrapped_list_that_got_another_plugin_stays_a_list() -> None:
    made = chain.with_plugin(Conf("10-a.conf", {"name": "mynet", **BRIDGE}), ENTRY)
    made.document["plugins"].insert(1, {"type": "bandwidth"})
    again = chain.with_plugin(made, ENTRY)
    assert again == made
    left = chain.without_plugin(again)
    assert left is not None
    assert (left.file, left.types) == ("10-a.conflist", ["bridge", "bandwidth"])


def test_a_list_of_our_own_has_all_of_the_primary_one() -> None:
    primary = listed(BRIDGE, {"type": "istio-cni"}, ENTRY, {"type": "portmap"}, disableCheck=True)
    own = chain.owned(primary, ENTRY, "00-own.conflist")
    assert own.file == "00-own.conflist"
    assert own.document == {
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [BRIDGE, {"type": "portmap"}, {**ENTRY, "made_from": "10-a.conflist"}],
        "disableCheck": True,
    }
    assert chain.is_owned(own)
    assert not chain.is_owned(chain.with_plugin(primary, ENTRY))
    assert chain.without_plugin(own) is None


@pytest.mark.parametrize("version", ["0.2.0", "1.0.0", None])
def test_a_list_of_our_own_is_made_from_a_single_plugin_too(version: str | None) -> None:
    head = {"cniVersion": version} if version else {}
    single = Conf("10-a.conf", {**head, "name": "mynet", **BRIDGE})
    own = chain.owned(single, ENTRY, "00-own.conflist")
    assert own.plugins == [BRIDGE, {**ENTRY, "made_from": "10-a.conf"}]
    assert (own.document["name"], own.document["cniVersion"]) == ("mynet", "1.0.0" if version == "1.0.0" else "0.3.1")
    wrapped = chain.with_plugin(single, ENTRY)
    assert chain.owned(wrapped, ENTRY, "00-own.conflist").plugins == [BRIDGE, {**ENTRY, "made_from": "10-a.conflist"}]


def test_nothing_is_left_of_a_network_of_our_own() -> None:
    alone = chain.standalone("YYY-sidestep-cni.conf", ENTRY)
    assert (alone.document["name"], alone.document["cniVersion"]) == ("istio-cni", "0.3.1")
    assert chain.without_plugin(alone) is None
    assert chain.without_plugin(listed(ENTRY)) is None


def test_the_first_valid_name_counts() -> None:
    good = json.dumps({"name": "n", "plugins": [BRIDGE]}).encode()
    found, problems = chain.first_valid(
        {
            "05-empty.conflist": b"",
            "06-list.conf": good,
            "07-nameless.conflist": b'{"plugins": [{"type": "a"}]}',
            "08-typeless.conflist": b'{"name": "n", "plugins": [{}]}',
            "09-array.conf": b"[]",
            "10-good.conflist": good,
            "11-later.conflist": good,
        }
    )
    assert found is not None
    assert found.file == "10-good.conflist"
    assert [str(problem).split()[0] for problem in problems] == [
        "05-empty.conflist",
        "06-list.conf",
        "07-nameless.conflist",
        "08-typeless.conflist",
        "09-array.conf",
    ]


def test_a_network_that_is_only_ours_is_no_primary_one() -> None:
    alone = chain.standalone("00-x.conf", ENTRY)
    assert chain.first_valid({"00-x.conf": alone.render()}) == (None, [])


def test_what_is_no_configuration_is_named() -> None:
    with pytest.raises(InvalidConf, match=r'^10-a.conf has no "type"; a list of plugins must be in a .conflist file$'):
        chain.parse_list("10-a.conf", b'{"plugins": []}')


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("10-a.conflist", b"[" * 100_000),
        ("10-a.conflist", b'{"name": "n", "plugins": [{"type": "a", "x": 1e400}]}'),
        ("10-a.conflist", b'{"name": "n", "plugins": [{"type": "a", "x": NaN}]}'),
        ("10-a.conflist", b'{"name": 5, "plugins": [{"type": "a"}]}'),
        ("10-a.conflist", b'{"name": "n", "cniVersion": 1, "plugins": [{"type": "a"}]}'),
        ("10-a.conflist", b'{"name": "n", "plugins": [{"type": ["a"]}]}'),
        ("10-a.conflist", '{"name": "n", "plugins": [{"type": "a"}]}'.encode("utf-16")),
        ("10-a.conf", b'{"name": ["n"], "type": "a"}'),
    ],
)
def test_what_a_runtime_does_not_take_is_not_taken(file: str, content: bytes) -> None:
    with pytest.raises(InvalidConf, match=rf"^{file} "):
        chain.parse_list(file, content)


def test_any_string_survives() -> None:
    content = b'{"name": "n", "plugins": [{"type": "a", "half": "\\ud800", "whole": "\xc3\xa4"}]}'
    conf = chain.parse_list("10-a.conflist", content)
    assert chain.parse_list(conf.file, conf.render()) == conf
    assert conf.document["plugins"][0]["whole"] == "ä"


@pytest.mark.parametrize(
    "marker",
    [
        {},
        "x",
        None,
        {"file": "../evil.conf", "cniVersion": ""},
        {"file": "99-z.txt", "cniVersion": ""},
        {"file": "10-a.conf"},
        {"file": "10-a.conf", "cniVersion": 1},
    ],
)
def test_a_list_stays_one_when_what_it_was_cannot_be_believed(marker: Any) -> None:
    left = chain.without_plugin(listed(BRIDGE, {**ENTRY, "wrapped": marker}))
    assert left == listed(BRIDGE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
plugins = st.builds(
    lambda kind, keys: {**keys, "type": kind},
    st.sampled_from(["bridge", "calico", "portmap", "cilium-cni", "bandwidth"]),
    st.dictionaries(st.text(max_size=6).filter(lambda key: key not in ("name", "cniVersion")), json_values, max_size=3),
)
versions = st.sampled_from(["0.1.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
lists = st.builds(
    lambda chained, keys, name: Conf("10-a.conflist", {**keys, "name": name, "plugins": chained}),
    st.lists(plugins, min_size=1, max_size=4),
    st.builds(
        lambda keys, versions: {**keys, **versions},
        st.dictionaries(st.sampled_from(["disableCheck", "loadOnlyInlinedPlugins", "x"]), json_values, max_size=3),
        st.fixed_dictionaries({}, optional={"cniVersion": versions, "cniVersions": st.lists(versions)}),
    ),
    st.text(min_size=1, max_size=8),
)
singles = st.builds(
    lambda plugin, name, head: Conf("10-a.conf", {**head, "name": name, **plugin}),
    plugins,
    st.text(min_size=1, max_size=8),
    st.sampled_from([{}, {"cniVersion": "0.2.0"}, {"cniVersion": "0.3.1"}, {"cniVersion": "1.0.0"}]),
)


@given(lists | singles)
def test_in_and_out_again_is_as_before_and_twice_in_is_once(conf: Conf) -> None:
    inside = chain.with_plugin(conf, ENTRY)
    assert chain.with_plugin(inside, ENTRY) == inside
    assert inside.types == [*conf.types, "sidestep-cni"]
    assert chain.without_plugin(inside) == conf
    assert chain.parse_list(inside.file, inside.render()) == inside


@given(lists | singles)
def test_a_list_of_our_own_is_the_primary_one_and_us(conf: Conf) -> None:
    own = chain.owned(conf, ENTRY, "00-own.conflist")
    inside = chain.with_plugin(conf, ENTRY)
    assert own.plugins[:-1] == inside.plugins[:-1]
    assert own.types[-1] == "sidestep-cni"
    assert {**own.document, "plugins": 0} == {**inside.document, "plugins": 0}
    assert chain.parse_list(own.file, own.render()) == own
    assert chain.is_owned(own)


@given(lists, st.lists(st.tuples(st.integers(0, 4), st.sampled_from([ENTRY, {"type": "istio-cni"}])), max_size=3))
def test_wherever_we_or_istio_were_we_end_up_last_and_once(
    conf: Conf, before: list[tuple[int, dict[str, Any]]]
) -> None:
    mixed = list(conf.plugins)
    for place, entry in before:
        mixed.insert(place, entry)
    inside = chain.with_plugin(Conf(conf.file, {**conf.document, "plugins": mixed}), ENTRY)
    assert inside.plugins[:-1] == conf.plugins
    assert inside.types[-1] == "sidestep-cni"
    assert chain.with_plugin(inside, ENTRY) == inside
    assert chain.without_plugin(inside) == conf
