"""The run as a page: aims first, then ratios, then what this machine did."""

from collections.abc import Callable, Iterator
from functools import partial

from tests.bench.mesh.aims import verdicts
from tests.bench.mesh.blocks import Block, table
from tests.bench.mesh.ratios import BASELINE, TITLES, Metric, Samples, Spread
from tests.bench.mesh.results import Results
from tests.bench.mesh.workloads import WORKLOADS, Generator

_FATES = ("redirected", "undrained", "over_budget", "no_peer")  # fields of struct traffic

NOTES = """\
- Each cell is the median of the rounds, with the lowest and the highest in brackets. Ratios are made within a round:
  the pairs take turns at each workload, in an order that is drawn anew each time.
- "HTTP, mTLS" is what Istio does with most traffic: HTTP connection managers on both sides, connections to the
  Service's pod that stay open, mTLS between the Envoys. "tcp_proxy, mTLS" is a Service's port for TCP: a TLS connection
  for each of the client's. Both are configured as a real istiod does it, with inspectors of the first bytes, and have
  RSA keys of 2048 bits, as Istio's are, unless the row says ECDSA. "tcp_proxy" alone, and the streams, are bytes as
  they came, through the chains for what is no Service's, without inspectors.
- `iptables` has Istio's rules as the conformance suite writes them, `nftables` those that Istio's own plugin writes in
  its native nftables mode. `off`, `proxy`, `full` are sidestep's levels of acceleration, on a node each. `no-mesh` has
  no Envoys. `unix` is the same two Envoys chained by configuration over unix sockets, with the same mTLS: what no
  interception could do better than.
- Client, both Envoys (one worker thread each), server and kernel share the machine's cores, so requests/s is the whole
  path's. The pods hang on one bridge; no kube-proxy is in the way.
- CPU is the whole machine's time that was not idle, load generator and server included: the kernel may do its work on
  packets while nobody's process runs. It means something on a quiet machine only. CPU of the pods' cgroups is what the
  scheduler charged to the processes of both pods: without the rest of the machine, and without idle-time softirqs.
- Not quite comparable: in `unix` wrk (through a preloaded connect()), h2load and nginx use unix sockets too, so the
  applications gain as well, while iperf3 has none: loopback TCP at both ends, a unix socket between the Envoys.
- In the streams a request is one write(), and received is what arrived. wrk takes a request's time from its first byte:
  with a new connection per request, connect() is in requests/s and not in p50.
"""


def page(results: Results) -> str:
    """All of it."""
    samples = Samples(results.samples)
    parts = ["# Two mesh pods, one node", conditions(results), _aims(samples), *ratios(results), *absolutes(results)]
    parts.append("### received by streams, MB/s\n")
    streams = [name for name in results.workloads if WORKLOADS[name].generator is Generator.IPERF3]
    parts.append(_by_workload(results, samples.received, form=_plain, workloads=streams))
    parts += [
        _redirected(results),
        passed(results),
        wrong(results),
        *_beside(results),
        "## How to read this\n",
        NOTES,
    ]
    return "\n".join(parts)


def ratios(results: Results) -> Iterator[str]:
    """A section a metric: every workload, every way but the baseline."""
    samples = Samples(results.samples)
    for metric in Metric:
        yield f"## {TITLES[metric]}, ratio to iptables\n"
        yield _by_workload(results, partial(samples.ratio, metric=metric), skip=BASELINE)


def absolutes(results: Results) -> Iterator[str]:
    """What the ratios are made of."""
    samples = Samples(results.samples)
    yield "## What this machine did\n\nTimes of other machines differ, ratios less.\n"
    for metric, unit in (
        (Metric.RATE, "requests/s"),
        (Metric.P50, "p50, µs"),
        (Metric.P99, "p99, µs"),
        (Metric.CPU, "CPU seconds of the machine per 1,000 requests"),
        (Metric.PODS, "CPU seconds of the pods' cgroups per 1,000 requests"),
    ):
        yield f"### {unit}\n"
        yield _by_workload(results, partial(samples.absolute, metric=metric), form=_plain)


def conditions(results: Results) -> str:
    """How and where it was measured, and what speaks against the figures."""
    where = "; ".join(f"{name} {what}" for name, what in results.machine.items())
    done = len(Samples(results.samples).rounds)
    text = f"\nRounds: {done}. Load in each sample: {results.seconds} s. Order drawn with seed {results.seed}.\n\n"
    text += f"{where}.\n"
    if done < 5:
        text += "\n**Too few rounds to tell anything from: a trial.**\n"
    if results.busy_cores > 0.05:
        text += f"\n**The machine was not quiet: {results.busy_cores:.2f} cores were busy before. Trust no figure.**\n"
    return text


def _aims(samples: Samples) -> str:
    rows = [
        [
            WORKLOADS[each.workload].title,
            TITLES[each.metric],
            each.level,
            each.against,
            str(each.found) if each.found else "–",
            each.aim,
            each.verdict,
        ]
        for each in verdicts(samples)
    ]
    head = ["workload", "figure", "level", "against", "ratio", "aim", ""]
    return "## Aims\n\n" + table(head, rows)


def _plain(each: Spread) -> str:
    def shown(value: float) -> str:
        return f"{value:,.0f}" if each.median >= 100 else f"{value:.3g}"

    return f"{shown(each.median)} ({shown(each.low)}–{shown(each.high)})"


def _by_workload(
    results: Results,
    cell: Callable[[str, str], Spread | None],
    form: Callable[[Spread], str] = str,
    skip: str = "",
    workloads: list[str] | None = None,
) -> str:
    scenarios = [each for each in results.scenarios if each != skip]
    rows = []
    for workload in results.workloads if workloads is None else workloads:
        found = [cell(workload, scenario) for scenario in scenarios]
        if any(found):
            rows.append([WORKLOADS[workload].title, *(form(each) if each else "–" for each in found)])
    return table(["workload", *scenarios], rows)


def wrong(results: Results) -> str:
    """A section of what failed."""
    samples = Samples(results.samples)
    lines = [f"- {scenario}, {WORKLOADS[workload].title}: {n}" for (workload, scenario), n in samples.errors.items()]
    lines += [f"- {each}" for each in results.failures]
    return "## Requests and runs that failed\n\n" + ("\n".join(lines) if lines else "None.") + "\n"


def _redirected(results: Results) -> str:
    """Whether acceleration was at work at all."""
    columns = list(dict.fromkeys(key for sums in results.traffic.values() for key in sums))
    rows = [[name, *(f"{sums.get(key, 0):,}" for key in columns)] for name, sums in results.traffic.items()]
    head = ["level", *(key.replace("_", " ") for key in columns)]
    return "### messages of both pods, whole run\n\n" + (table(head, rows) if rows else "None.\n")


def passed(results: Results) -> str:
    """Of each workload's messages on accelerated connections, those that were redirected, and why others were not."""
    samples = Samples(results.samples)
    rows = []
    for workload in results.workloads:
        for scenario in results.scenarios:
            sums = samples.messages(workload, scenario)
            whole = sum(sums.get(key, 0) for key in _FATES)
            if whole:
                shares = (f"{100 * sums.get(key, 0) / whole:.1f}" for key in _FATES)
                rows.append([WORKLOADS[workload].title, scenario, f"{whole:,}", *shares])
    head = ["workload", "level", "messages", *(key.replace("_", " ") + ", %" for key in _FATES)]
    return "### messages of both pods, by workload\n\n" + (table(head, rows) if rows else "None.\n")


def _beside(results: Results) -> list[str]:
    return [Block(**each).markdown() for each in results.beside]
