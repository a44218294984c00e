"""Judges a node by what was looked at.

A pure function of the document of `sidestep status`, as plain values. So whoever has such a document can judge it, here
or elsewhere. A fault that follows from another one is not told twice, and faults with the same remedy share one advice.
"""

from collections.abc import Iterable, Iterator, Mapping

from installer.verdict.ambient import ambient
from installer.verdict.verdict import Finding, Looked, State, Verdict, listed

# the share of a map's entries from which on somebody should see to it
FULL = 0.8
# kinds of maps that are full by design, or that drop their oldest entries by themselves
_ROOMY = ("array", "percpu_array", "prog", "lru_hash")
_SINGLE = 1  # a map with room for one entry holds it from the start

_FIND_AGENT = "kubectl get pods -n istio-system -l 'k8s-app in (istio-cni-node, sidestep-shadow-node)' -o wide"
_START = f"start this node's agent (`{_FIND_AGENT}` shows whether it runs); until then"
START_AGENT = f"{_START} running pods stay as they are, and new mesh pods wait"
START_AGENT_TO_ATTACH = f"{_START} what is not attached captures nothing, and new mesh pods wait"
READ_LOG = "the agent should put this right within seconds; if it stays, read the agent's log"
_RESTART_AGENT = "read the agent's log; if it goes on, delete the agent's pod"
_LOOK_AS_AGENT = "look from the agent's pod, or as root with all capabilities and --proc of the node"
_LEAVE_PODS_ALONE = (
    "enter pods by `kubectl exec` or `kubectl debug`, not by nsenter; move a process back that somebody has moved"
)
_PROXYS_LOG = "read the proxy's log (`kubectl logs POD -c istio-proxy`): does it run, and where does it listen?"
# state of a proxy → what to do about it; the others have _PROXYS_LOG
_PROXIES = {
    "other user": "run the proxy as the user that the Pod says, or give the Pod the user that it runs as",
    "not known yet": READ_LOG,
}
# condition of /readyz → what to do if it does not hold; the others have READ_LOG
_CONDITIONS = {
    "synced": "see to the reason that is named: the API server, its address, or RBAC; the agent tries again by itself",
    "repairs": "allow it in the agent's ClusterRole, or turn that repair off; `sidestep agent --help` has the settings",
}


def verdict_on(looked: Looked) -> Verdict:
    """The verdict on a node, from the document of `sidestep status`."""
    agent = _Agent(looked["agent"], START_AGENT_TO_ATTACH if looked["attached"] is False else START_AGENT)
    captured = [each for each in looked["pods"] if each["state"] != "shadow"]
    found = [
        *_programs(looked, agent),
        *agent.findings(),
        *_steering(captured, agent),
        *_processes(captured, bool(looked["attached"])),
        *_proxies(captured, looked["sidecars"]["ending"]),
        *ambient(looked["ambient"], captured, agent.is_well),
        *_sidecars(looked, agent),
        *_refused(looked["refused"]["refused"]),
        *_misspelt(looked["sidecars"]["misspelt"]),
        *_chain(looked["chain"], agent),
        *_acceleration(looked["acceleration"]),
        *_maps(looked["maps"]),
        *_handovers(looked["pods"]),
    ]
    seen = {each.part for each in found if each.state is not State.NOTE}
    found += _readiness(looked, agent, seen)
    order = (State.WRONG, State.UNKNOWN, State.NOTE)
    return Verdict(tuple(sorted(found, key=lambda each: order.index(each.state))), len(captured))


class _Agent:
    """What is known of the agent, which is the remedy for much of the rest."""

    def __init__(self, told: Looked, start: str) -> None:
        """`start` is what to do if it is away."""
        self._told, self.start = told, start
        self.is_away = told["pid"] is None and bool(told["fault"])

    @property
    def remedy(self) -> str:
        """What to do about a thing that a running agent puts right by itself."""
        return self.start if self.is_away or self._told["fault"] else READ_LOG

    @property
    def is_well(self) -> bool:
        """Whether it answers."""
        return not self._told["fault"]

    def misses(self, condition: str) -> bool:
        """Whether the agent itself says that this condition of its readiness does not hold."""
        return condition in self._told["health"]["missing"]

    def findings(self) -> Iterator[Finding]:
        """What is wrong with the agent itself."""
        told, health = self._told, self._told["health"]
        if self.is_away and not health["fault"]:
            what = f"an agent answers at port {health['port']}, but at {told['socket']}: {told['fault']}"
            yield Finding(State.UNKNOWN, "agent", what, "give the --cni-agent-run-dir of that agent")
        elif self.is_away:
            yield Finding(State.WRONG, "agent", f"{told['socket']}: {told['fault']}", self.start)
        elif told["fault"]:
            what = f"process {told['pid']} listens at {told['socket']}: {told['fault']}"
            yield Finding(State.WRONG, "agent", what, _RESTART_AGENT)
        elif health["fault"]:
            what = f"port {health['port']}: {health['fault']}"
            yield Finding(State.UNKNOWN, "readiness", what, "give the --health-port of the agent")


def _programs(looked: Looked, agent: _Agent) -> Iterator[Finding]:
    if problem := looked["problem"]:
        what, _, advice = problem.partition("; ")
        state = State.UNKNOWN if looked["attached"] is None else State.WRONG
        # unless the pins are elsewhere, which an agent that is started does not change
        is_agents = agent.is_away and what.startswith("nothing is attached") and not advice.startswith("give ")
        yield Finding(state, "programs", what, agent.start if is_agents else advice)
        return
    if not looked["attached"]:
        idle = [each["hook"] for each in looked["programs"] if not each["attached"] and _should_run(each, looked)]
        what = not_attached(idle) if idle else "a link, program or map is missing"
        yield Finding(State.WRONG, "programs", what, agent.remedy)
    elif not looked["current"]:
        what = "attached are those of another version than this command's"
        yield Finding(State.NOTE, "programs", what, "use the command in the agent's image, or restart the agent")
    for layout, pods in looked["kept_by_others"].items():
        what = f"another version's ({layout}) are attached too, and capture pods that are not taken over: "
        how = "read `layout.kept` in the agent's log; if a pod has no process that the agent can see, restart the pod"
        state = State.WRONG if pods else State.NOTE
        yield Finding(state, "programs", what + (listed(pods) or "none is left"), how if pods else "")


def not_attached(hooks: list[str]) -> str:
    """What every command says of programs that run nowhere."""
    return f"{listed(hooks)} not attached"


def _should_run(program: Looked, looked: Looked) -> bool:
    """Whether a program that runs nowhere should run: those of pods run nowhere if there is no pod."""
    return bool(looked["pods"]) or program["hook"] not in ("steer", "message")


def _steering(pods: list[Looked], agent: _Agent) -> Iterator[Finding]:
    for state, means, found, advice in (
        ("not steered", "inbound reaches the application", State.WRONG, agent.remedy),
        ("unknown", "the pod's namespace can't be looked at", State.UNKNOWN, _LOOK_AS_AGENT),
    ):
        if names := [each["pod"] for each in pods if each["steering"] == state]:
            yield Finding(found, "inbound", f"{state}: {means} ({_of(names, pods)})", advice)


def _processes(pods: list[Looked], is_attached: bool) -> Iterator[Finding]:
    for pod in pods:
        if strays := pod["processes"]["strays"]:
            each = listed([f"{one['pid']} {one['name']} (cgroup {one['cgroup']})" for one in strays])
            what = f"{pod['pod']}: stray processes, whose outbound connections are not captured: {each}"
            yield Finding(State.WRONG, "processes", what, _LEAVE_PODS_ALONE)
    if not is_attached:  # where nothing is attached, nobody can say which processes the programs see
        return
    reasons: dict[str, list[str]] = {}
    for pod in pods:
        if unknown := pod["processes"]["unknown"]:
            reasons.setdefault(unknown, []).append(pod["pod"])
    for reason, names in reasons.items():
        what = f"stray processes: unknown: {reason} ({_of(names, pods)})"
        yield Finding(State.UNKNOWN, "processes", what, _LOOK_AS_AGENT)


def _proxies(pods: list[Looked], ending: list[str]) -> Iterator[Finding]:
    """A proxy that ends with its Pod is as it should be. Of pods in ambient mode, ambient.py judges."""
    words: dict[tuple[str, str], list[str]] = {}
    for pod in pods:
        proxy = pod["proxy"]
        if pod["is_ambient"]:
            continue
        if proxy["state"] != "listens" and pod["steering"] != "namespace gone" and pod["pod"] not in ending:
            words.setdefault((proxy["state"], proxy["words"]), []).append(pod["pod"])
    for (state, told), names in words.items():
        advice = _PROXIES.get(state, _PROXYS_LOG)
        yield Finding(State.WRONG, "proxy", f"{told}: {listed(names)}", advice)


def _sidecars(looked: Looked, agent: _Agent) -> Iterator[Finding]:
    told = looked["sidecars"]
    remove = "remove istio-cni's plugin from the CNI chain of this node, then `sidestep takeover` these pods"
    if twice := told["captured_twice"]:
        what = f"its rules are in pods that sidestep captures as well: {listed(twice)}"
        yield Finding(State.WRONG, "istio-cni", what, remove)
    elif twice is None and not looked["problem"]:
        what = "whether its rules are in enrolled pods can't be seen"
        yield Finding(State.UNKNOWN, "istio-cni", what, _LOOK_AS_AGENT)
    if nobodys := told["captured_by_nobody"]:
        what = f"shadow pods whose rules are gone, so that NOBODY captures them: {listed(nobodys)}"
        yield Finding(State.WRONG, "istio-cni", what, "the agent captures them within a minute; " + agent.remedy)
    if watched := [each["pod"] for each in looked["pods"] if each["state"] == "shadow"]:
        what = f"shadow: Istio's rules capture them, and sidestep only compares: {listed(watched)}"
        yield Finding(State.NOTE, "pods", what, "`sidestep shadow` says what was found")
    if told["unknown"]:
        what, advice = _split(told["unknown"])
        words = f"other pods with a sidecar: not known: {what}"
        yield Finding(State.UNKNOWN, "pods", words, advice or "see to the reason that is named")
    for pod in told["left_out"]:
        if pod["state"] == "not captured":
            how = agent.remedy if pod["is_awaited"] else "see to the reason that is named, and create the pod anew"
            what = f"not captured, with a sidecar: {pod['pod']}: {pod['reason']}"
            yield Finding(State.WRONG, "pods", what, how)
        elif pod["state"] == "unknown":
            what = f"unknown whether captured, with a sidecar: {pod['pod']}: {pod['reason']}"
            yield Finding(State.UNKNOWN, "pods", what, _LOOK_AS_AGENT)
    others: dict[tuple[str, str], list[str]] = {}
    for pod in told["left_out"]:
        if pod["state"] in ("Istio's rules", "left alone"):
            others.setdefault((pod["state"], pod["reason"]), []).append(pod["pod"])
    for (state, reason), names in others.items():
        yield Finding(State.NOTE, "pods", f"{state}: {reason}: {listed(names)}")


def _misspelt(pods: Mapping[str, list[str]]) -> Iterator[Finding]:
    for pod, words in pods.items():
        how = "correct the Pod's template; an annotation that nobody knows has no effect"
        yield from (Finding(State.NOTE, "annotations", f"{pod}: {each}", how) for each in words)


def _refused(refused: list[Looked]) -> Iterator[Finding]:
    if refused:
        names = listed([each["pod"] for each in refused])
        what = f"refused, so they don't start: {names}: {refused[-1]['words']}"
        yield Finding(State.NOTE, "pods", what, "`sidestep pods --refused` has all of them, with times and annotations")


def _chain(chain: Looked, agent: _Agent) -> Iterator[Finding]:
    plugin, entry = chain["plugin"], chain["entry"]
    if not chain["is_ours"]:
        return
    if entry["rival"] and chain["may_stand_by"]:
        yield Finding(State.NOTE, "chain", "istio-cni captures new pods, and sidestep looks on: shadow mode")
    elif entry["rival"]:
        yield Finding(State.WRONG, "chain", *_split(entry["rival"]))
    for part, told in (("plugin", plugin), ("chain", entry)):
        if told["fault"] and not entry["rival"]:
            is_unseen = told["fault"].startswith("cannot be checked") and not agent.misses("installed")
            state = State.UNKNOWN if is_unseen else State.WRONG
            where = f"{told['file']}: " if told["file"] else ""
            advice = _LOOK_AS_AGENT if state is State.UNKNOWN else agent.remedy
            yield Finding(state, part, f"{where}{told['fault']}, so new pods may go uncaptured", advice)
    for remark in entry["remarks"]:
        yield Finding(State.NOTE, "chain", remark)


def _split(sentence: str) -> tuple[str, str]:
    """A sentence that ends with what to do, in these two parts."""
    what, _, advice = sentence.partition("; ")
    return what, advice


def _acceleration(told: Looked | None) -> Iterator[Finding]:
    if told is None or told["level"] == told["wanted"]:
        return
    what = f"{told['level']} instead of {told['wanted']}: {told['reason'] or 'no reason is known'}"
    if told["reason"].startswith("not tried yet"):
        yield Finding(State.UNKNOWN, "acceleration", what, "the agent tries again by itself; capture works meanwhile")
    else:
        how = f"nothing else suffers; see to the reason, or set SIDESTEP_ACCELERATION={told['level']}"
        yield Finding(State.WRONG, "acceleration", what, how)


def _maps(maps: list[Looked]) -> Iterator[Finding]:
    for each in maps:
        entries, limit = each["entries"], each["limit"]
        if each["kind"] not in _ROOMY and entries and limit and limit > _SINGLE and entries > FULL * limit:
            yield Finding(
                State.WRONG,
                "maps",
                f"{each['name']} is {100 * entries // limit} % full ({entries} of {limit} entries)",
                f"see who fills it: `sidestep maps {each['name']} --pod POD`; have fewer ranges, or spread pods",
            )


def _handovers(pods: list[Looked]) -> Iterator[Finding]:
    if losers := [f"{each['pod']} {each['lost_handovers']}" for each in pods if each["lost_handovers"]]:
        what = f"captured connections have reached their proxy WITHOUT original destination: {listed(losers)}"
        yield Finding(State.NOTE, "hand-overs", what, "if the number grows, report it with `sidestep status --verbose`")


def _readiness(looked: Looked, agent: _Agent, seen: Iterable[str]) -> Iterator[Finding]:
    """The conditions of /readyz that do not hold, without those whose cause was found already."""
    causes = {"attached": "programs", "serving": "agent", "installed": "chain"}
    for name, why in looked["agent"]["health"]["missing"].items():
        if causes.get(name, name) in seen or (name == "installed" and "plugin" in seen):
            continue
        yield Finding(State.WRONG, "readiness", f"{name}: {why}", _CONDITIONS.get(name, READ_LOG))


def _of(names: list[str], pods: list[Looked]) -> str:
    return f"{len(names)} of {len(pods)} pods: {listed(names)}"
