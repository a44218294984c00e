"""Finds a pod by its name, and a name by its pod's cookie."""

from collections.abc import Iterable

from bpf.errors import SidestepError
from bpf.layout import Cookie
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.entries import Identity

_SHOWN = 10  # names in a message


class NoSuchPod(SidestepError):
    """No enrolled pod has this name, or several pods have it."""


def cookie_of(tables: Tables, name: str) -> int:
    """The netns cookie of the pod NAMESPACE/NAME, or of NAME if only one pod has that name. Raises NoSuchPod."""
    every: dict[int, Identity] = {key.cookie: Identity.of(pod) for key, pod in tables.pods.every()}
    found = {cookie: identity for cookie, identity in every.items() if name in (str(identity), identity.name)}
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise NoSuchPod(f"several pods are called {name}: {_listed(found.values())}; give one of these")
    raise NoSuchPod(f"no enrolled pod is called {name}; enrolled pods: {_listed(every.values()) or 'none'}")


def _listed(identities: Iterable[Identity]) -> str:
    names = sorted(map(str, identities))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def enrolled_names(pins: Pins) -> list[str]:
    """NAMESPACE/NAME of every enrolled pod, sorted. Raises NotAttached, KernelRefused."""
    with Tables(pins.look_only()) as tables:
        return sorted(str(Identity.of(pod)) for _, pod in tables.pods.every())


class PodNames:
    """Pod names by netns cookie. Each is looked up once, so a pod that has gone keeps its name."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._names: dict[int, str] = {}

    def __call__(self, cookie: int) -> str:
        """NAMESPACE/NAME, or the cookie if no pod has it."""
        if cookie not in self._names:
            pod = self._tables.pods.get(Cookie(cookie))
            if pod is None:
                return f"netns {cookie}"
            self._names[cookie] = str(Identity.of(pod))
        return self._names[cookie]
