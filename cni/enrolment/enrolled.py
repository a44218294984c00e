"""The pods that are in the maps, and the entries that each one has.

The maps are the only state. This module keeps an index of them by pod, so that most questions need no walk of the maps.
It reads the index back from the maps when the agent starts.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

from bpf import attachment, links
from bpf.errors import SidestepError
from bpf.layout import INBOUND_PORT, Cookie, PodEntry, PodFlags
from bpf.pins import Pins
from bpf.tables import Table, Tables
from cni.enrolment import rows
from cni.enrolment.entries import Entries, Identity
from cni.enrolment.rows import rows_of
from cni.enrolment.superseded import Key, Superseded
from cni.enrolment.turns import Turns

_NOBODY = Identity("", "", "", "", "", "")
Keys = set[Key]


class Known(NamedTuple):
    """A pod's identity, and the keys of its rows."""

    identity: Identity
    keys: Keys


class Enrolled:
    """Answers questions about the enrolled pods of this node. Safe to use from many threads."""

    def __init__(self, pins: Pins, tables: Tables) -> None:
        self._pins = pins
        self._tables = tables
        self._turns = Turns()
        self._superseded = Superseded()
        self._index = self._read_back()  # a pod's item changes in the pod's turn; list() and dict() copy in one step

    def undisturbed(self, cookie: int) -> AbstractContextManager[None]:
        """Keep other threads from enrolling, changing and removing this pod until the `with` block ends."""
        return self._turns.of(cookie)

    def entry(self, cookie: int) -> PodEntry | None:
        """The pod's own entry as the programs see it; None if the pod is not enrolled."""
        return self._tables.pods.get(Cookie(cookie))

    def cookies(self) -> list[int]:
        """The netns cookies of all enrolled pods."""
        return list(self._index)

    def identities(self) -> dict[int, Identity]:
        """The identities of all enrolled pods, by netns cookie."""
        return {cookie: known.identity for cookie, known in self._known()}

    def unsteered(self) -> set[int]:
        """The netns cookies of pods without a living sk_lookup link that leads to our program."""
        return set(self.cookies()) - links.steered_pods(self._pins, self._tables.ids())

    def slots(self) -> dict[int, set[int]]:
        """The slots in which each pod has a listener of its proxy, by netns cookie; pods without any are left out."""
        found: dict[int, set[int]] = {}
        for key in self._tables.listeners.every_key():
            if key.port == INBOUND_PORT:
                found.setdefault(key.cookie, set()).add(key.slot)
        return found

    def inodes(self, cookies: Collection[int]) -> dict[int, int]:
        """Those of these pods that live: netns cookie → inode of the namespace."""
        return {
            cookie: inode
            for cookie, inode in links.linked_pods(self._pins)
            if inode and cookie in self._index and cookie in cookies
        }

    def of_attachment(self, container_id: str, ifname: str, netns_cookie: int | None = None) -> list[int]:
        """The netns cookies of the pods that a DEL of this container and interface shall remove.

        The container of an adopted pod's sandbox is not always known. So an adopted pod is found by `netns_cookie` too:
        the cookie of the namespace that came with the DEL, if one did.
        """
        return [
            cookie
            for cookie, known in self._known()
            if known.identity.ifname == ifname
            and (known.identity.container_id == container_id or (known.identity.is_adopted and cookie == netns_cookie))
        ]

    def of_network(self, network: str) -> dict[int, Identity]:
        """The pods enrolled through one CNI network, by netns cookie: a GC decides on these."""
        return {cookie: known.identity for cookie, known in self._known() if known.identity.network == network}

    def differences(self, cookie: int, entries: Entries) -> list[str]:
        """How the maps differ from the entries that a pod should have: one sentence for each difference."""
        found = []
        if not links.is_pod_steered(self._pins, cookie, self._tables.ids()):
            found.append("the namespace has no inbound steering (sk_lookup) link")
        pod = self._tables.pods.get(Cookie(cookie))
        if pod is None:
            return [*found, f"no entry in pods for {entries.identity} (netns cookie {cookie})"]
        # which entries do not say: whether the Pod is being deleted since, and who captures it
        kept = PodFlags(pod.flags) & (PodFlags.DELETED | PodFlags.SHADOW)
        entries = replace(entries, flags=entries.flags | kept)
        if bytes(pod) != bytes(_as_adopted(entries, Identity.of(pod)).pod(pod.policy)):
            found.append(
                f"entry of {entries.identity} is {Identity.of(pod)} with flags {PodFlags(pod.flags)!s}, "
                f"should have flags {entries.flags!s}, or differs in proxy ids, sources or counts"
            )
        for row in rows_of(cookie, entries, pod.policy):
            stored = self._table(row.table).get(row.key)
            if stored is None or bytes(stored) != bytes(row.value):
                found.append(row.meaning())
        return found

    def damaged(self) -> dict[int, Identity]:
        """The pods whose entries are not all there: somebody else has removed or replaced them. By netns cookie."""
        return {cookie: known.identity for cookie, known in self._known() if self._is_damaged(cookie)}

    def is_attached(self) -> bool:
        """Whether all programs are pinned, their global links attached, and the pinned maps those of this process."""
        try:
            ours = attachment.is_pinned(self._pins, "pods", self._tables.pods.descriptor)
            return ours and attachment.is_attached(self._pins)
        except SidestepError:  # pins went meanwhile, or are another version's
            return False

    def is_captured(self, cookie: int) -> bool:
        """Whether the programs decide on a pod's connections in both directions. Cheap enough for every ADD."""
        if not attachment.is_deciding(self._pins) or not links.pod_link_alive(self._pins, cookie):
            return False
        # if the programs were attached anew with new tables, they do not read ours
        return attachment.is_pinned(self._pins, "pods", self._tables.pods.descriptor)

    def __len__(self) -> int:
        return len(self._index)

    def _known(self) -> list[tuple[int, Known]]:
        return list(self._index.items())

    def _is_damaged(self, cookie: int) -> bool:
        with self.undisturbed(cookie):
            known = self._index.get(cookie)
            if known is None or not known.identity.name:
                return False
            return self._tables.pods.get(Cookie(cookie)) is None or any(
                self._table(name).get(self._table(name).key.from_buffer_copy(raw)) is None for name, raw in known.keys
            )

    def _table(self, name: str) -> Table[Any, Any]:
        table: Table[Any, Any] = getattr(self._tables, name)
        return table

    def _read_back(self) -> dict[int, Known]:
        """The index as the maps have it. Pods that a crash left half-written are in it without a name.

        Rows of terms that are not in force are not in it: a crash left them in the middle of a change.
        """
        entries = {key.cookie: (Known(Identity.of(pod), set()), pod.policy) for key, pod in self._tables.pods.every()}
        index = {cookie: known for cookie, (known, _) in entries.items()}
        for name in rows.TABLES:
            for key in self._table(name).every_key():
                if name in rows.LASTING and key.cookie in entries and key.policy != entries[key.cookie][1]:
                    self._superseded.add([(name, bytes(key))])
                else:
                    index.setdefault(key.cookie, Known(_NOBODY, set())).keys.add((name, bytes(key)))
        return index


def lasting(keys: Keys) -> Keys:
    """Those of a pod's rows that are of its terms."""
    return {key for key in keys if key[0] in rows.LASTING}


def _as_adopted(entries: Entries, stored: Identity) -> Entries:
    """The entries that a pod should have. If the stored pod is adopted, its attachment is taken as right."""
    if not stored.is_adopted:
        return entries
    known = replace(entries.identity, container_id=stored.container_id, network=stored.network, ifname=stored.ifname)
    return replace(entries, identity=known)
