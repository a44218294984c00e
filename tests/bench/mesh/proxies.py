"""The Envoys that are measured: one listener a direction, TCP proxying or HTTP by the port that is asked for.

Plain TCP between the pods: mTLS costs the same whoever captures, and hides what is compared. No access log.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.envoy import Envoy
from tests.lab.pod import Pod

OUTBOUND, INBOUND = 15001, 15006
_NETWORK = "type.googleapis.com/envoy.extensions.filters.network"
_UNLIMITED = 1_000_000_000  # as Istio has it for clusters to original destinations


@dataclass(frozen=True)
class Service:
    """One port of the server, and what Envoys make of connections to it."""

    name: str
    port: int
    is_http: bool  # HTTP connection manager, else tcp_proxy
    speaks: str  # http1, http2 or bytes


SERVICES = {
    each.name: each
    for each in (
        Service("tcp", 8080, False, "http1"),
        Service("http", 8081, True, "http1"),
        Service("tcp-h2", 8082, False, "http2"),
        Service("http-h2", 8083, True, "http2"),
        Service("stream", 5201, False, "bytes"),
    )
}


class InterceptingEnvoy(Envoy):
    """The sidecar: 15001 and 15006, original destinations. One worker thread."""

    def __init__(self, pod: Pod) -> None:
        super().__init__(pod.directory, pod.netns, pod.cgroup, workers=1)

    def configuration(self) -> dict[str, Any]:
        """Both directions."""
        clusters = [_original("passthrough"), _original("inbound")]
        clusters[1]["upstream_bind_config"] = {"source_address": {"address": "127.0.0.6", "port_value": 0}}
        clusters.append({"name": "blackhole", "type": "STATIC", "connect_timeout": "1s"})
        listeners = [_intercepting(OUTBOUND, "passthrough"), _intercepting(INBOUND, "inbound")]
        return _bootstrap(self.admin, listeners, clusters)


class ChainedEnvoy(Envoy):
    """The same Envoy without interception: every service from one address to the next."""

    def __init__(self, pod: Pod, ways: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """`ways` has Envoy's addresses of where to listen and where to go, by service."""
        super().__init__(pod.directory, pod.netns, pod.cgroup, workers=1)
        self._ways = ways

    def configuration(self) -> dict[str, Any]:
        """A listener and a cluster a service."""
        listeners, clusters = [], []
        for name, (here, there) in self._ways.items():
            chain = _chain(name, SERVICES[name].is_http)
            listeners.append({"name": name, "address": here, "filter_chains": [chain]})
            clusters.append(_static(name, there))
        return _bootstrap(self.admin, listeners, clusters)


def pipe(path: Path) -> dict[str, Any]:
    """A unix socket as Envoy writes it, open to all users."""
    return {"pipe": {"path": str(path), "mode": 0o777}}


def loopback(port: int) -> dict[str, Any]:
    """A port of 127.0.0.1 as Envoy writes it."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _bootstrap(admin: Path, listeners: list[dict[str, Any]], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    resources = {"listeners": listeners, "clusters": clusters}
    return {"admin": {"address": {"pipe": {"path": str(admin)}}}, "static_resources": resources}


def _intercepting(port: int, cluster: str) -> dict[str, Any]:
    filters = "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"
    http = [
        {"filter_chain_match": {"destination_port": each.port}, **_chain(cluster, True)}
        for each in SERVICES.values()
        if each.is_http
    ]
    return {
        "name": cluster,
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "listener_filters": [{"name": "original_dst", "typed_config": {"@type": filters}}],
        "filter_chains": [
            {"filter_chain_match": {"destination_port": port}, **_chain("blackhole", False)},
            *http,
            _chain(cluster, False),
        ],
    }


def _chain(cluster: str, is_http: bool) -> dict[str, Any]:
    return {"filters": [_http(cluster) if is_http else _tcp(cluster)]}


def _tcp(cluster: str) -> dict[str, Any]:
    kind = f"{_NETWORK}.tcp_proxy.v3.TcpProxy"
    return {"name": "tcp", "typed_config": {"@type": kind, "stat_prefix": cluster, "cluster": cluster}}


def _http(cluster: str) -> dict[str, Any]:
    router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}
    config = {
        "@type": f"{_NETWORK}.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": cluster,
        "codec_type": "AUTO",
        "http_filters": [{"name": "router", "typed_config": {"@type": router}}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    return {"name": "http", "typed_config": config}


def _original(name: str) -> dict[str, Any]:
    return {"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", **_upstream()}


def _static(name: str, address: dict[str, Any]) -> dict[str, Any]:
    plain = {"pipe": {"path": address["pipe"]["path"]}} if "pipe" in address else address
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": plain}}]}]
    return {"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": endpoints}} | (
        _upstream()
    )


def _upstream() -> dict[str, Any]:
    """No limit of connections, and HTTP/2 to whom the client speaks it."""
    limits = {each: _UNLIMITED for each in ("max_connections", "max_pending_requests", "max_requests")}
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    as_downstream: dict[str, Any] = {"http_protocol_options": {}, "http2_protocol_options": {}}
    protocol = {"@type": f"type.googleapis.com/{options}", "use_downstream_protocol_config": as_downstream}
    return {
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [limits]},
        "typed_extension_protocol_options": {options: protocol},
    }
