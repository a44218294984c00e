"""The Envoys that are measured, in sidecars: configured as istiod does it, with a Service's ports and bare ones beside.

One worker thread, and no access log, as Istio has none by default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.envoy import PROXY_ID, Envoy
from tests.lab.istiod.identities import KeyKind, mesh_authority
from tests.lab.istiod.sent import HTTP, TCP, resources, with_port_like, with_tcp_service
from tests.lab.pod import Pod

OUTBOUND, INBOUND = 15001, 15006
HOST = "server"  # the Service's name in the routes that istiod has sent
Json = dict[str, Any]


@dataclass(frozen=True)
class Service:
    """One port of the server, and what Envoys make of connections to it."""

    name: str
    port: int
    is_http: bool  # HTTP connection manager, else tcp_proxy
    speaks: str  # http1, http2 or bytes
    is_mutual: bool = False  # a Service's port, called by mTLS; else bytes as they came, and no inspectors
    key_kind: KeyKind = KeyKind.RSA


SERVICES = {
    each.name: each
    for each in (
        Service("http", HTTP, True, "http1", is_mutual=True),
        Service("http-h2", 8083, True, "http2", is_mutual=True),
        Service("mtls", TCP, False, "http1", is_mutual=True),
        Service("mtls-ecdsa", 9002, False, "http1", is_mutual=True, key_kind=KeyKind.ECDSA),
        Service("tcp", 8082, False, "http1"),
        Service("tcp-h2", 8084, False, "http2"),
        Service("stream", 5201, False, "bytes"),
    )
}


class MeshEnvoy(Envoy):
    """What both kinds of Envoys have: certificates with keys of either kind."""

    def __init__(self, pod: Pod) -> None:
        super().__init__(pod.directory, pod.netns, pod.cgroup, workers=1)
        self.key_kind = KeyKind.RSA
        self._second = pod.directory / KeyKind.ECDSA

    def start(self) -> None:
        """Run it and wait until it is live."""
        self._second.mkdir(exist_ok=True)
        mesh_authority().issue(self._second, "default", self._directory.name, PROXY_ID, KeyKind.ECDSA)
        super().start()

    def sent(self) -> Json:
        """What istiod sends for all ports that are a Service's."""
        static = resources("REDIRECT", self.log, self._directory)
        with_tcp_service(static)
        with_port_like(static, HTTP, SERVICES["http-h2"].port, http2=True)
        with_port_like(static, TCP, SERVICES["mtls-ecdsa"].port, secret=KeyKind.ECDSA)
        _forget_logs(static)
        static["secrets"].append({"name": KeyKind.ECDSA, "tls_certificate": certificate(self._second)})
        return static

    def with_admin(self, static: Json) -> Json:
        """A whole configuration."""
        return {"admin": {"address": {"pipe": {"path": str(self.admin)}}}, "static_resources": static}


class InterceptingEnvoy(MeshEnvoy):
    """The sidecar: 15001 and 15006, original destinations, inspectors."""

    def __init__(self, pod: Pod, server: Pod) -> None:
        """`server` is the pod that is the Service's one endpoint."""
        super().__init__(pod)
        self._server = server

    def configuration(self) -> Json:
        """As istiod sends it; a bare port goes through the chains for what is no Service's, without inspectors."""
        static = self.sent()
        inbound = next(each for each in static["listeners"] if each["name"] == "virtualInbound")
        for inspector in inbound["listener_filters"]:
            if "filter_disabled" in inspector:
                inspector["filter_disabled"]["or_match"]["rules"] += [
                    {"destination_port_range": {"start": each.port, "end": each.port + 1}}
                    for each in SERVICES.values()
                    if not each.is_mutual
                ]
        for each in SERVICES.values():
            if each.is_mutual:
                address = {"socket_address": {"address": str(self._server.ip4), "port_value": each.port}}
                give_endpoint(outbound_cluster(static, each.port), address)
        return self.with_admin(static)


def outbound_cluster(static: Json, port: int) -> Json:
    """Of a Service's port."""
    found: Json = next(each for each in static["clusters"] if each["name"].startswith(f"outbound|{port}|"))
    return found


def give_endpoint(cluster: Json, address: Json) -> None:
    """One, as a Service's pod is: the connections to it are pooled. `address` is as Envoy writes it."""
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    cluster |= {"type": "STATIC", "lb_policy": "LEAST_REQUEST"}
    cluster["load_assignment"] = {"cluster_name": cluster["name"], "endpoints": endpoints}


def certificate(directory: Path) -> Json:
    """Where its files are, as Envoy writes it."""
    files = {"certificate_chain": "cert.pem", "private_key": "key.pem"}
    return {key: {"filename": str(directory / name)} for key, name in files.items()}


def _forget_logs(thing: Any) -> None:
    if isinstance(thing, dict):
        thing.pop("access_log", None)
    for each in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        _forget_logs(each)
