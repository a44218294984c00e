"""Examines whether this kernel takes this version's programs and maps, and what refused ones are needed for.

Extras that the kernel lacks are warnings: capture works without them.
"""

import re
from collections.abc import Mapping

from bpf.bpffs import require_bpffs
from bpf.compiler import HERE
from bpf.errors import CompileFailed, KernelRefused, LibraryMissing
from bpf.extras import EXTRAS, Extra
from bpf.hooks import HOOKS
from bpf.loader import NOT_PERMITTED, Refused
from bpf.loading import try_each
from installer.probe.findings import Finding, Presence, finding_of
from installer.scratch import scratch_pins
from installer.settings import Attachment

_WHAT, _NEEDED_BY = "programs and maps", "everything"
# macros by which maps.h declares maps → the map's kind, and the position of its name in the arguments. The kind of a
# TABLE is its first argument
_MACROS = {
    "TABLE": ("", 3),
    "SOCKET_TABLE": ("sockhash", 2),
    "SOCKET_STORAGE": ("sk_storage", 1),
    "RING": ("ringbuf", 0),
}


def loading(attachment: Attachment) -> list[Finding]:
    """A row for each program or map that the kernel refuses, or one row if it takes all; then the extras it lacks.

    Attaches nothing. Raises UnknownExtra.
    """
    try:
        require_bpffs(attachment.bpffs)
        with scratch_pins(attachment.bpffs) as directory:
            refused = try_each(directory)
    except (CompileFailed, LibraryMissing) as error:
        advice = "install python3-bpfcc 0.25 or newer, with its LLVM"
        return [Finding(_WHAT, _NEEDED_BY, str(error), Presence.NO, advice)]
    except (KernelRefused, OSError):
        return [Finding(_WHAT, _NEEDED_BY, "not tried: they need a bpffs", Presence.UNKNOWN, "see the row bpffs")]
    found = f"{len(HOOKS)} programs and {len(map_kinds())} maps, compiled and loaded"
    rows = refused_rows(refused) or [Finding(_WHAT, _NEEDED_BY, found, Presence.YES)]
    return rows if refused.maps else [*rows, *lacking_rows(refused.lacking)]


def refused_rows(refused: Refused) -> list[Finding]:
    """A row for each refused program or map; no rows if none is refused."""
    if NOT_PERMITTED in (*refused.maps.values(), *refused.programs.values()):
        return [Finding(_WHAT, _NEEDED_BY, "not permitted to try", Presence.UNKNOWN, "see the other rows")]
    rows = [finding_of(map_kinds()[name], f"{name}: {why}") for name, why in refused.maps.items()]
    if rows:
        why = "the programs were not tried: they need all maps"
        return [*rows, Finding(_WHAT, _NEEDED_BY, why, Presence.UNKNOWN, "see the other rows")]
    return [finding_of(hook, why) for hook, why in refused.programs.items()]


def lacking_rows(lacking: Mapping[str, str]) -> list[Finding]:
    """A row for each extra that this kernel does not have: name → why."""
    return [_lacking(each, lacking[each.name]) for each in EXTRAS if each.name in lacking]


def _lacking(extra: Extra, why: str) -> Finding:
    if why == NOT_PERMITTED:
        return Finding(extra.name, extra.needed_by, "not permitted to try", Presence.WARNING, "see the other rows")
    advice = f"without it, {extra.without}; Linux {extra.since}, or newer, has it"
    return Finding(extra.name, extra.needed_by, f"not there: {why}", Presence.WARNING, advice)


def map_kinds() -> dict[str, str]:
    """Map name → map kind, in BCC's words, of all maps in maps.h."""
    kinds = {}
    for macro, words in re.findall(r"^([A-Z_]+)\((.*)\)$", (HERE / "maps.h").read_text(), re.MULTILINE):
        kind, position = _MACROS[macro]
        arguments = words.split(", ")
        kinds[arguments[position]] = kind or arguments[0].strip('"')
    return kinds
