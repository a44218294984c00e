"""The health of this node's agent: which process answers at the CNI socket, and what its /readyz says."""

import http.client
import json
from typing import Any

from cni import protocol
from installer.commands.agent_socket import ANSWER_SECONDS, ask_agent, found_silent
from installer.settings import Node, Ports

_LOCALHOST = "127.0.0.1"
# a runtime's question whether pods could be added (CNI's STATUS)
_STATUS = {
    "version": 1,
    "command": "STATUS",
    "container_id": "",
    "ifname": "",
    "netns": "",
    "args": "",
    "config": {"cniVersion": protocol.NEWEST_VERSION, "name": "sidestep", "type": "sidestep-cni"},
}


def agent_of(node: Node, ports: Ports) -> dict[str, Any]:
    """The state of the socket and of the health port. `fault` says what is wrong with each ("": nothing)."""
    pid, _, fault = ask_agent(node.cni_agent_run_dir, _STATUS)
    health = _at_port(ports.health_port, "not asked" if found_silent(node.cni_agent_run_dir) else "")
    return {
        "socket": str(node.cni_agent_run_dir / protocol.SOCKET_NAME),
        "pid": pid,
        "fault": fault,
        "version": health.pop("version"),
        "health": health,
    }


def _at_port(port: int, not_asked: str) -> dict[str, Any]:
    """The state of the health port: the answer of /readyz. `not_asked` says why it is not asked, "" if it is."""
    found: dict[str, Any] = {"port": port, "ready": False, "missing": {}, "fault": not_asked, "version": None}
    if not_asked:
        return found
    connection = http.client.HTTPConnection(_LOCALHOST, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/readyz")
        reply = connection.getresponse()
        body = json.loads(reply.read(1 << 16))
    except TimeoutError:
        return found | {"fault": f"no answer within {ANSWER_SECONDS:g} s"}
    except (OSError, ValueError, http.client.HTTPException) as error:
        return found | {"fault": getattr(error, "strerror", None) or f"no agent answers: {error}"}
    finally:
        connection.close()
    name, _, version = (reply.getheader("Server") or "").partition("/")
    if not isinstance(body, dict) or reply.status not in (200, 503):
        return found | {"fault": f"no agent answers there: HTTP status {reply.status}"}
    told = {"ready": reply.status == 200, "missing": body.get("missing", {})}
    return found | told | {"version": version if name == "sidestep" else None}
