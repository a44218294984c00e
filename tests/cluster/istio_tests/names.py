"""Names of tests without what differs from run to run: the numbers of namespaces, and addresses of the cluster."""

import re
from collections import Counter
from collections.abc import Collection
from ipaddress import ip_address

from tests.cluster.addresses import HOSTS, POD_NETWORKS, SERVICES

_NUMBERS = re.compile(r"-\d+-\d{1,5}(?=[./:_-]|$)")  # Istio's framework: PREFIX-COUNT-RANDOM
_ADDRESS = re.compile(r"\d+(?:\.\d+){3}|[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){2,7}")
_NAMESPACE, _ANY = "-N-N", "ADDRESS"


class Names:
    """Of one run. Names that are equal without their numbers are counted, in the order in which their tests began."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._seen: Counter[str] = Counter()

    def lasting(self, name: str) -> str:
        """What the test is called in every run."""
        if name not in self._known:
            above, slash, own = name.rpartition("/")
            plain = (self.lasting(above) if above else "") + slash + _ADDRESS.sub(_hide, _NUMBERS.sub(_NAMESPACE, own))
            self._seen[plain] += 1
            self._known[name] = plain if self._seen[plain] == 1 else f"{plain}~{self._seen[plain]}"
        return self._known[name]


def pattern_of(names: Collection[str]) -> str:
    """Of -test.run: it fits tests of these lasting names in another run, and what is below them."""
    return "|".join("/".join(map(_level, name.split("/"))) for name in names)


def _level(own: str) -> str:
    escaped = re.escape(re.sub(r"~\d+$", "", own))
    escaped = escaped.replace(re.escape(_NAMESPACE), "-[0-9]+-[0-9]+")
    return "^" + re.sub(f"{_ANY}v[46]", ".+", escaped) + "$"


def _hide(found: re.Match[str]) -> str:
    try:
        address = ip_address(found[0])
    except ValueError:
        return found[0]
    ranges = (*HOSTS, *SERVICES, *POD_NETWORKS)
    # the same in every run are those that the tests have chosen themselves
    return f"{_ANY}v{address.version}" if any(address in each for each in ranges) else found[0]
