"""Whether an enrolled pod's proxy takes inbound connections: what the maps and the pod's namespace say of it now."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bpf.layout import INBOUND_PORT, PodFlags
from installer.commands.pods.enrolled_pods import EnrolledPod
from installer.commands.pods.namespace import NamespaceView


class Proxy(StrEnum):
    """The states of a proxy, by the words that every command uses."""

    LISTENS = "listens"
    ABSENT = "absent"
    OTHER_USER = "other user"
    NOT_YET = "not known yet"


@dataclass(frozen=True)
class ProxyState:
    """The state with what it means, as a sentence."""

    state: Proxy
    words: str

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"state": str(self.state), "words": self.words}


def proxy_state(pod: EnrolledPod, inside: NamespaceView | None) -> ProxyState:
    """How the pod's proxy is. `inside` is None if the namespace can't be looked at; then the maps alone tell.

    The map of listeners has only sockets that listen: the kernel takes one out when it closes.
    """
    is_ambient = PodFlags.AMBIENT in pod.flags
    if pod.inbound_listeners:
        return ProxyState(Proxy.LISTENS, f"{'ztunnel' if is_ambient else 'the proxy'} listens on {INBOUND_PORT}")
    users = inside.users(INBOUND_PORT) if inside else []
    if not users:
        if is_ambient:
            return ProxyState(Proxy.ABSENT, "ztunnel does not have the pod, so its connections are refused")
        return ProxyState(Proxy.ABSENT, f"no proxy listens on {INBOUND_PORT}, so inbound connections are refused")
    wanted = pod.entry.proxy_uid
    if is_ambient:
        return ProxyState(Proxy.NOT_YET, f"somebody listens on {INBOUND_PORT}, and sidestep knows no ztunnel that does")
    if wanted in users:
        return ProxyState(Proxy.NOT_YET, f"the proxy listens on {INBOUND_PORT}, and sidestep does not know it yet")
    return ProxyState(
        Proxy.OTHER_USER,
        f"uid {', '.join(map(str, users))} listens on {INBOUND_PORT}, the proxy is uid {wanted} by the Pod",
    )
