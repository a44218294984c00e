"""The verdict on a node: one finding and one advice for one fault, and unknown is never well."""

import copy
from typing import Any

import pytest

from installer.verdict.node import START_AGENT, START_AGENT_TO_ATTACH, verdict_on
from installer.verdict.verdict import State, Verdict

AWAY = {"pid": None, "fault": "nobody is there", "health": {"fault": "Connection refused"}}


def node(**changes: Any) -> dict[str, Any]:
    """A document of `sidestep status` of a node where all is well, with some parts changed."""
    well: dict[str, Any] = {
        "problem": "",
        "attached": True,
        "current": True,
        "kept_by_others": {},
        "programs": [{"hook": "connect4", "attached": 1}, {"hook": "steer", "attached": 1}],
        "maps": [{"name": "pods", "kind": "hash", "entries": 1, "limit": 4096}],
        "pods": [pod()],
        "acceleration": {"level": "proxy", "wanted": "proxy", "reason": ""},
        "refused": {"unknown": "", "refused": []},
        "sidecars": {
            "unknown": "",
            "left_out": [],
            "ending": [],
            "captured_twice": [],
            "captured_by_nobody": [],
            "misspelt": {},
        },
        "chain": {
            "is_ours": True,
            "may_stand_by": False,
            "plugin": {"file": "/bin/sidestep-cni", "fault": ""},
            "entry": {"file": "/net.d/10-a.conflist", "fault": "", "found_in": [], "rival": "", "remarks": []},
        },
        "agent": {
            "socket": "/run/cni.sock",
            "pid": 7,
            "fault": "",
            "version": "1",
            "health": {"port": 8000, "ready": True, "missing": {}, "fault": ""},
        },
        "ambient": {"is_on": False, "is_expected": False, "unknown": "", "ztunnels": 0, "problem": "", "pods": []},
    }
    return merged(well, changes)


def pod(**changes: Any) -> dict[str, Any]:
    well: dict[str, Any] = {
        "pod": "default/alpha",
        "uid": "u-alpha",
        "is_ambient": False,
        "state": "captured",
        "steering": "steered",
        "processes": {"captured": 2, "strays": [], "unknown": ""},
        "proxy": {"state": "listens", "words": "the proxy listens on 15006"},
        "lost_handovers": 0,
    }
    return merged(well, changes)


def merged(well: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(well)
    for name, value in changes.items():
        found[name] = merged(found[name], value) if isinstance(value, dict) and isinstance(found[name], dict) else value
    return found


def told(verdict: Verdict) -> list[tuple[str, str]]:
    return [(each.part, each.what) for each in verdict.findings]


def test_a_node_on_which_all_is_well_is_ok() -> None:
    verdict = verdict_on(node())
    assert (verdict.state, verdict.exit_status, verdict.findings) == (State.OK, 0, ())
    assert verdict.headline == "OK: one pod is captured, nothing is wrong"


@pytest.mark.parametrize(
    ("changes", "part", "words"),
    [
        ({"problem": "nothing is attached: /x is not there; run it", "attached": False}, "programs", "nothing is att"),
        ({"attached": False, "programs": [{"hook": "connect4", "attached": 0}]}, "programs", "connect4 not attached"),
        ({"kept_by_others": {"v3": ["default/old"]}}, "programs", "not taken over: default/old"),
        ({"pods": [pod(steering="not steered")]}, "inbound", "inbound reaches the application (1 of 1 pods: default/"),
        (
            {"pods": [pod(processes={"strays": [{"pid": 5, "name": "sh", "cgroup": "/x"}]})]},
            "processes",
            "5 sh (cgroup",
        ),
        (
            {"pods": [pod(proxy={"state": "absent", "words": "no proxy listens"})]},
            "proxy",
            "no proxy listens: default/",
        ),
        ({"sidecars": {"captured_twice": ["default/alpha"]}}, "istio-cni", "captures as well: default/alpha"),
        ({"sidecars": {"captured_by_nobody": ["default/alpha"]}}, "istio-cni", "NOBODY captures them: default/alpha"),
        ({"chain": {"entry": {"fault": "entry missing"}}}, "chain", "10-a.conflist: entry missing"),
        ({"chain": {"plugin": {"fault": "of another version"}}}, "plugin", "sidestep-cni: of another version"),
        ({"chain": {"entry": {"rival": "istio-cni runs; remove it"}}}, "chain", "istio-cni runs"),
        ({"acceleration": {"level": "off", "reason": "unsafe"}}, "acceleration", "off instead of proxy: unsafe"),
        (
            {"maps": [{"name": "routes", "kind": "lpm_trie", "entries": 81, "limit": 100}]},
            "maps",
            "routes is 81 % full",
        ),
        ({"agent": {"fault": "no answer within 3 s"}}, "agent", "process 7 listens at /run/cni.sock: no answer"),
        ({"agent": {"health": {"missing": {"synced": "403"}}}}, "readiness", "synced: 403"),
    ],
)
def test_each_fault_is_one_finding_that_says_what_to_do(changes: dict[str, Any], part: str, words: str) -> None:
    verdict = verdict_on(node(**changes))
    ((found_part, what),) = told(verdict)
    assert (found_part, verdict.state, verdict.exit_status) == (part, State.WRONG, 1)
    assert words in what
    assert verdict.findings[0].advice
    assert verdict.headline == "WRONG: one thing"


def test_a_shadow_pod_is_a_note_whatever_its_steering_and_its_proxy_are() -> None:
    shadow = pod(state="shadow", steering="not steered", proxy={"state": "absent", "words": "no proxy listens"})
    verdict = verdict_on(node(pods=[shadow]))
    assert verdict.state is State.OK
    ((part, what),) = told(verdict)
    assert (part, what) == (
        "pods",
        "shadow: Istio's rules capture them, and sidestep only compares: default/alpha",
    )


def test_in_shadow_mode_the_chain_may_be_istio_cnis() -> None:
    verdict = verdict_on(node(chain={"may_stand_by": True, "entry": {"rival": "istio-cni runs; remove it"}}))
    assert verdict.state is State.OK
    assert told(verdict) == [("chain", "istio-cni captures new pods, and sidestep looks on: shadow mode")]


def test_a_proxy_that_ends_with_its_pod_is_no_fault() -> None:
    ended = pod(proxy={"state": "absent", "words": "no proxy listens"})
    assert verdict_on(node(pods=[ended], sidecars={"ending": [ended["pod"]]})).state is State.OK
    assert verdict_on(node(pods=[ended], sidecars={"ending": ["default/other"]})).state is State.WRONG


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"problem": "/x has the pins of layout v0; use that command", "attached": None, "pods": []}, "programs"),
        ({"pods": [pod(steering="unknown")]}, "inbound"),
        ({"pods": [pod(processes={"unknown": "no procfs"})]}, "processes"),
        ({"sidecars": {"captured_twice": None}}, "istio-cni"),
        ({"sidecars": {"unknown": "nowhere to get Pods from; give --pods"}}, "pods"),
        ({"chain": {"entry": {"fault": "cannot be checked: no such file"}}}, "chain"),
        ({"acceleration": {"level": "off", "reason": "not tried yet: no memory"}}, "acceleration"),
        ({"agent": {"health": {"fault": "Connection refused"}}}, "readiness"),
    ],
)
def test_what_cannot_be_looked_at_is_unknown_and_never_well(changes: dict[str, Any], part: str) -> None:
    verdict = verdict_on(node(**changes))
    assert ([each.part for each in verdict.findings], verdict.state, verdict.exit_status) == ([part], State.UNKNOWN, 3)
    assert verdict.headline.startswith("UNKNOWN: one thing can't be looked at")


def test_a_fault_beside_something_unknown_is_wrong() -> None:
    verdict = verdict_on(node(pods=[pod(steering="unknown"), pod(steering="not steered")]))
    assert (verdict.exit_status, [each.state for each in verdict.findings]) == (1, [State.WRONG, State.UNKNOWN])
    assert verdict.headline == "WRONG: one thing; one thing can't be looked at"


def test_without_an_agent_the_agent_is_the_one_remedy_for_all_that_it_would_put_right() -> None:
    verdict = verdict_on(
        node(
            agent=AWAY,
            attached=False,
            programs=[{"hook": "connect4", "attached": 0}],
            pods=[pod(steering="not steered", processes={"unknown": "nothing is attached"})],
            chain={"entry": {"fault": "entry missing"}},
        )
    )
    (group,) = verdict.advised()
    assert group[1] == START_AGENT_TO_ATTACH
    assert "running pods stay as they are" not in group[1]  # nothing captures their connections
    assert {each.part for each in group[0]} == {"programs", "agent", "inbound", "chain"}


def test_a_condition_of_readyz_is_not_told_again_when_its_cause_was_found() -> None:
    missing = {"attached": "a link is gone", "serving": "the socket is gone", "installed": "entry missing"}
    verdict = verdict_on(
        node(
            attached=False,
            programs=[{"hook": "connect4", "attached": 0}],
            chain={"plugin": {"fault": "missing"}},
            agent=AWAY | {"health": {"missing": missing, "fault": "Connection refused"}},
        )
    )
    assert [each.part for each in verdict.findings] == ["programs", "agent", "plugin"]


def test_an_agent_that_does_not_install_is_not_blamed_for_the_chain() -> None:
    changed = {"is_ours": False, "plugin": {"fault": "missing"}, "entry": {"fault": "entry missing"}}
    assert verdict_on(node(chain=changed)).findings == ()


def test_maps_that_are_full_by_design_are_no_fault() -> None:
    kinds = [("array", 1), ("lru_hash", 100), ("hash", 1), ("ringbuf", None)]
    maps = [{"name": kind, "kind": kind, "entries": limit, "limit": limit} for kind, limit in kinds]
    maps.append({"name": "pods", "kind": "hash", "entries": 80, "limit": 100})
    assert verdict_on(node(maps=maps)).findings == ()


def test_pods_under_istios_own_rules_are_a_note_and_those_that_nobody_captures_a_fault() -> None:
    def left(state: str, is_awaited: bool = False) -> dict[str, Any]:
        return {"pod": "default/beta", "state": state, "is_awaited": is_awaited, "reason": "why"}

    states = {
        "Istio's rules": State.OK,
        "left alone": State.OK,
        "unknown": State.UNKNOWN,
        "not captured": State.WRONG,
    }
    for state, wanted in states.items():
        verdict = verdict_on(node(sidecars={"left_out": [left(state, is_awaited=True)]}))
        assert verdict.state is wanted
        assert "default/beta" in verdict.findings[0].what


def test_pods_that_were_refused_are_a_note_with_the_last_words() -> None:
    refused = [{"pod": "default/a", "words": "no"}, {"pod": "default/b", "words": '"80-90" is not a port'}]
    verdict = verdict_on(node(refused={"refused": refused}))
    assert verdict.state is State.OK
    assert verdict.findings[0].what == 'refused, so they don\'t start: default/a, default/b: "80-90" is not a port'


def test_many_pods_are_named_in_one_line_with_the_number_of_the_others() -> None:
    pods = [pod(pod=f"default/{number}", steering="not steered") for number in range(7)]
    (found,) = verdict_on(node(pods=pods)).findings
    assert "(7 of 7 pods: default/0, default/1, default/2, default/3, default/4 and 2 more)" in found.what


def test_it_is_told_as_plain_values() -> None:
    document = verdict_on(node(agent=AWAY)).document()
    assert (document["state"], document["headline"]) == ("wrong", "WRONG: one thing")
    (found,) = document["findings"]
    assert (found["state"], found["part"], found["advice"]) == ("wrong", "agent", START_AGENT)
