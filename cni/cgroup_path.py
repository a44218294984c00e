"""The names that runtimes give to cgroups, as paths below the root of the hierarchy."""

from pathlib import Path

_SLICE = ".slice"


def below_root(name: str) -> Path | None:
    """The path of the cgroup that a runtime names; None if that is no name of a cgroup.

    A runtime names a path ("/kubepods/burstable/podUID"), a slice of systemd ("kubepods-pod1.slice": CRI-O with the
    systemd driver), or a scope in a slice as runc does ("kubepods-pod1.slice:crio:ID").
    """
    parts = name.split(":")
    if not name or "\0" in name or ".." in name.split("/") or len(parts) not in (1, 3):
        return None
    if len(parts) == 1:
        path = Path(name.lstrip("/"))
        return path if len(path.parts) > 1 else _in_slice(path.name)
    parent, prefix, scope = parts
    unit = scope if scope.endswith(_SLICE) else f"{prefix}-{scope}.scope" if prefix else f"{scope}.scope"
    above = _in_slice(parent) if "/" not in parent and parent.endswith(_SLICE) else None
    return above / unit if above is not None and "/" not in unit else None


def _in_slice(name: str) -> Path:
    """The path of a unit. Dashes in a slice's name say what it is in: a-b.slice is in a.slice (systemd.slice(5))."""
    if not name.endswith(_SLICE):
        return Path(name)
    parts = name.removesuffix(_SLICE).split("-")
    if parts == ["", ""]:  # "-.slice" is the root
        return Path()
    return Path(*("-".join(parts[:number]) + _SLICE for number in range(1, len(parts) + 1)))
