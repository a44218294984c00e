"""The texts of `sidestep coverage` for people."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType

from installer.commands.printing import line, rendered, table

_TEXTS = ("NAMESPACE", "NAME", "PEER", "PROTOCOL", "RULE", "PROCESS", "MODE")
_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def coverage_table(documents: list[dict[str, Any]], has_titles: bool) -> str:
    """A row for each pod."""
    if not documents and has_titles:
        return "no enrolled pods\n"
    titles = ("NAMESPACE", "NAME", "SHARE", "CAPTURED", "PAST", "REFUSED", "MODE")
    rows = (
        (
            each["namespace"],
            each["name"],
            share(each["covered"]),
            each["captured"],
            each["past"],
            each["refused"],
            each["on_uncaptured"],
        )
        for each in documents
    )
    parts: list[RenderableType] = [table(titles, rows, _TEXTS, has_titles)]
    for each in documents if has_titles else ():
        parts += [line(f"{each['pod']}: not told: {words}") for words in each["not_told"]]
    return rendered(*parts)


def coverage_text(document: dict[str, Any], has_titles: bool) -> str:
    """Everything about one pod."""
    return rendered(*_parts(document, has_titles))


def share(covered: float | None) -> str | None:
    """A share as people read it. It is 100 % only if nothing at all went past the proxy."""
    if covered is None:
        return None
    return "100 %" if covered == 1 else f"{min(covered * 100, 99.9):.1f} %"


def _parts(document: dict[str, Any], has_titles: bool) -> Iterator[RenderableType]:
    if has_titles:
        yield line(_headline(document))
        yield line(f"uncaptured: {document['on_uncaptured']} (sidestep.io/uncaptured)", "  ")
    for title, name in (("past the proxy", "past_the_proxy"), ("refused", "refusals")):
        rows = document[name]
        if rows:
            if has_titles:
                yield line(f"{title}:")
            yield table(("PEER", "PROTOCOL", "COUNT", "RULE", "PROCESS", "LAST"), map(_row, rows), _TEXTS, has_titles)
    if has_titles:
        rows = [*document["past_the_proxy"], *document["refusals"]]
        reasons = {(each["rule"], each["why"]): each["annotation"] for each in rows}
        for (rule, why), annotation in sorted(reasons.items()):
            behind = f'; {annotation["name"]}: "{annotation["value"]}"' if annotation else ""
            yield line(f"{rule}: {why}{behind}")
        for each in document["not_told"]:
            yield line(f"not told: {each}")


def _headline(document: dict[str, Any]) -> str:
    covered = share(document["covered"])
    if covered is None:
        return f"{document['pod']}: nothing was sent or received yet, so it is not known how much is captured"
    seen = document["captured"] + document["past"]
    past = f"; past the proxy: {document['past']}" if document["past"] else ""
    refused = f"; refused: {document['refused']}" if document["refused"] else ""
    return f"{document['pod']}: captured {covered} of {seen} connections and datagrams{past}{refused}"


def _row(each: dict[str, Any]) -> tuple[Any, ...]:
    process = each["process"]
    who = None if process is None else f"{process['command'] or process['pid'] or 'unknown'} (uid {process['uid']})"
    return each["peer"], each["protocol"], each["count"], each["rule"], who, _ago(each["last"])


def _ago(when: str) -> str:
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()))
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"
