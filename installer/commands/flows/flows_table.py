"""The texts of `sidestep flows` for people."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType

from installer.commands.printing import line, rendered, table
from installer.commands.sampling.figures import count, size, span

_CARRIED = ("OPEN", "CLOSED", "SENT", "RECEIVED", "RESENT", "RTT", "LASTED")
_APART = ("OUT-SENT", "OUT-RECEIVED", "IN-SENT", "IN-RECEIVED")
_TEXTS = ("NAMESPACE", "NAME", "DESTINATION", "PORT", "VERDICT")
_DIRECTIONS = ("outbound", "inbound")
_TO_PROXY = "RESENT and RTT of captured connections are those of the way to the pod's own proxy"


def flows_table(documents: list[dict[str, Any]], is_wide: bool, has_titles: bool) -> str:
    """A row for each pod; if it is wide, with the bytes of both directions apart."""
    if not documents:
        return "no enrolled pods\n" if has_titles else ""
    titles = (*_CARRIED[:5], *(_APART if is_wide else ()))
    rows = ((each["namespace"], each["name"], *_sums(each, is_wide)) for each in documents)
    parts = [table(("NAMESPACE", "NAME", *titles), rows, _TEXTS, has_titles)]
    for each in documents if has_titles else ():
        parts += [line(f"{each['pod']}: not told: {words}") for words in each["not_told"]]
    return rendered(*parts)


def flows_text(document: dict[str, Any], is_wide: bool, has_titles: bool) -> str:
    """Everything about one pod."""
    return rendered(*_parts(document, is_wide, has_titles))


def _sums(document: dict[str, Any], is_wide: bool) -> list[Any]:
    both = [document[direction] for direction in _DIRECTIONS]
    names = ("closed", "sent_bytes", "received_bytes", "retransmits")
    sums: dict[str, Any] = {name: sum(each[name] for each in both) for name in names}
    sums["open"] = None if both[0]["open"] is None else sum(each["open"] for each in both)
    apart = [size(each[name]) for each in both for name in names[1:3]] if is_wide else []
    return [*_cells(sums)[:5], *apart]


def _parts(document: dict[str, Any], is_wide: bool, has_titles: bool) -> Iterator[RenderableType]:
    if has_titles:
        yield line(_headline(document))
    for direction, title in zip(_DIRECTIONS, ("DESTINATION", "PORT"), strict=True):
        rows = [each for each in document["flows"] if each["direction"] == direction]
        if not rows:
            continue
        if has_titles:
            yield line(f"{direction}:")
        further = ("LAST CLOSED", *(("VERDICT",) if direction == "outbound" else ())) if is_wide else ()
        yield table((title, *_CARRIED, *further), (_row(each, is_wide) for each in rows), _TEXTS, has_titles)
    if has_titles:
        if any(each["verdict"] == "captured" for each in document["flows"]):
            yield line(_TO_PROXY)
        for each in document["not_told"]:
            yield line(f"not told: {each}")


def _headline(document: dict[str, Any]) -> str:
    told = []
    for direction in _DIRECTIONS:
        of = document[direction]
        is_open = "?" if of["open"] is None else count(of["open"])
        told.append(
            f"{direction} {is_open} open, {count(of['closed'])} closed, "
            f"sent {size(of['sent_bytes'])}, received {size(of['received_bytes'])}"
        )
    return f"{document['pod']}: {'; '.join(told)}"


def _row(each: dict[str, Any], is_wide: bool) -> list[Any]:
    is_inbound = each["direction"] == "inbound"
    further = [_ago(each["last_closed"]), *([] if is_inbound else [each["verdict"]])]
    return [each["port"] if is_inbound else each["peer"], *_cells(each), *(further if is_wide else [])]


def _cells(of: dict[str, Any]) -> list[Any]:
    """In the order of _CARRIED."""
    numbers = [None if of[name] is None else count(of[name]) for name in ("open", "closed")]
    bytes_ = [size(of[name]) for name in ("sent_bytes", "received_bytes")]
    seconds = [of.get(name) for name in ("rtt_seconds", "duration_seconds")]
    times = [None if each is None else span(each) for each in seconds]
    return [*numbers, *bytes_, count(of["retransmits"]), *times]


def _ago(when: str | None) -> str | None:
    if when is None:
        return None
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds())
    return f"{span(float(int(seconds)))} ago"
