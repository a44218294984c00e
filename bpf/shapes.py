"""What the maps of this version hold, as digests of their declarations in maps.h.

Two versions of sidestep tell by these which of their maps are the same. Comments do not count, nor does anything in
maps.h that no map depends on. Bits of a flags field never get another meaning, so their names do not count either.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("maps.h")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_MAP = re.compile(r"^(TABLE|SOCKET_TABLE|SOCKET_STORAGE|RING)\(([^;{}()]*)\)$", re.M)
_STRUCT = re.compile(r"^struct (\w+) \{.*?^\}[^;]*;", re.M | re.S)
_ENUM = re.compile(r"^enum \w+ \{(.*?)^\};", re.M | re.S)
_CONSTANT = re.compile(r"^#define (\w+) (.+)$", re.M)
_WORD = re.compile(r"\b[A-Za-z_]\w*\b")
# the arguments of each macro: first those that say what an entry is, then those that say how many there may be
_ENTRY = {"TABLE": (1, 2), "SOCKET_TABLE": (0, 1), "SOCKET_STORAGE": (0,), "RING": ()}
_NAME = {"TABLE": 3, "SOCKET_TABLE": 2, "SOCKET_STORAGE": 1, "RING": 0}
_LENGTH = 12  # hexadecimal digits of a digest


class Shape(NamedTuple):
    """Digests of what an entry of a map is, and of the whole declaration: type, entry, size and flags."""

    entry: str
    whole: str


@cache
def shapes() -> dict[str, Shape]:
    """The shape of each map of this version, by name."""
    return shapes_in(_SOURCE.read_text())


@cache
def layout_of_maps() -> str:
    """The name of this version's layout: v and a digest. It differs if any map differs, or is new or gone."""
    return f"v{_digest(*(f'{name} {shape.whole}' for name, shape in sorted(shapes().items())))}"


def shapes_in(source: str) -> dict[str, Shape]:
    """The shape of each map that a text like maps.h declares."""
    text = _COMMENT.sub("", source)
    meanings = _meanings(text)
    found = {}
    for kind, arguments in _MAP.findall(text):
        given = [each.strip() for each in arguments.split(",")]
        entry = [given[index] for index in _ENTRY[kind]]
        found[given[_NAME[kind]]] = Shape(
            _digest(*_explained(" ".join(entry), meanings)), _digest(kind, *_explained(" ".join(given), meanings))
        )
    return found


def _meanings(text: str) -> dict[str, str]:
    """What each name of a struct, an enum's member or a constant stands for."""
    found = {match[1]: match[0] for match in _STRUCT.finditer(text)}
    for members in _ENUM.findall(text):
        found |= dict.fromkeys(_WORD.findall(members), members)
    return found | dict(_CONSTANT.findall(text))


def _explained(text: str, meanings: dict[str, str]) -> list[str]:
    """A text, and the meanings of all names in it and in those meanings."""
    seen: dict[str, str] = {}
    left = [text]
    while left:
        for word in _WORD.findall(left.pop()):
            if word in meanings and word not in seen:
                seen[word] = meanings[word]
                left.append(meanings[word])
    return [text, *(f"{word} {' '.join(meaning.split())}" for word, meaning in sorted(seen.items()))]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_LENGTH]
