"""What the load generators say, in one form. Pure: text in, figures out."""

import json
import re
from dataclasses import dataclass


class Unreadable(Exception):
    """A load generator has not said what it should."""


@dataclass(frozen=True)
class Figures:
    """One run of a load generator. Times in microseconds; of a stream, each write counts as a request."""

    requests: int
    seconds: float
    received: int  # bytes
    errors: int
    p50: float | None = None
    p99: float | None = None


def from_wrk(output: str) -> Figures:
    """The line that wrk.lua adds to wrk's output."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise Unreadable(f"wrk: {output.strip()[-500:]}")
    seen = json.loads(lines[-1])
    return Figures(
        seen["requests"], seen["duration"] / 1e6, seen["bytes"], seen["errors"], float(seen["p50"]), float(seen["p99"])
    )


def from_h2load(output: str, log: str) -> Figures:
    """h2load's summary, and its log of requests: start, status and time in microseconds, tabs between."""
    rate = re.search(r"finished in [^,]+, ([0-9.]+) req/s", output)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    received = re.search(r"traffic: \S+ \((\d+)\) total", output)
    if not (rate and counts and received):
        raise Unreadable(f"h2load: {output.strip()[-500:]}")
    succeeded, *wrong = (int(count) for count in counts.groups())
    if not succeeded:
        raise Unreadable(f"h2load: not one request of {sum(wrong)} succeeded")
    times = sorted(float(line.split("\t")[2]) for line in log.splitlines())
    seconds = succeeded / float(rate[1])
    return Figures(succeeded, seconds, int(received[1]), sum(wrong), percentile(times, 0.5), percentile(times, 0.99))


def from_iperf3(output: str, write_size: int) -> Figures:
    """iperf3's JSON: what the receiving end got."""
    try:
        seen = json.loads(output)
        end = seen["end"]["sum_received"]
    except (ValueError, KeyError) as error:
        raise Unreadable(f"iperf3: {output.strip()[-500:]}") from error
    if "error" in seen or not end["bytes"]:
        raise Unreadable(f"iperf3: {seen.get('error', 'nothing was received')}")
    return Figures(end["bytes"] // write_size, end["seconds"], end["bytes"], 0)


def percentile(ordered: list[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    if not ordered:
        raise Unreadable("no times of requests were logged")
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
