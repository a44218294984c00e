"""The same Envoys without interception: chained by their configuration, every service from one address to the next."""

from pathlib import Path
from typing import Any

from tests.bench.mesh.proxies import SERVICES, Json, MeshEnvoy, give_endpoint, outbound_cluster
from tests.lab.pod import Pod

_TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"


class ChainedEnvoy(MeshEnvoy):
    """One of the two."""

    def __init__(self, pod: Pod, ways: dict[str, tuple[Json, Json]], is_server: bool) -> None:
        """`ways` has Envoy's addresses of where to listen and where to go, by service."""
        super().__init__(pod)
        self._ways, self._is_server = ways, is_server

    def configuration(self) -> Json:
        """A listener and a cluster a service; filters and TLS of a Service's port are those that istiod sends."""
        sent = self.sent()
        listeners, clusters = [], []
        for name, (here, there) in self._ways.items():
            chain, cluster = self._parts(sent, name)
            give_endpoint(cluster, _plain(there))
            listeners.append({"name": name, "address": here, "filter_chains": [chain]})
            clusters.append(cluster)
        return self.with_admin({"listeners": listeners, "clusters": clusters, "secrets": sent["secrets"]})

    def _parts(self, sent: Json, name: str) -> tuple[Json, Json]:
        """The chain and the cluster."""
        service = SERVICES[name]
        if not service.is_mutual:
            filters = [{"name": "tcp", "typed_config": {"@type": _TCP_PROXY, "stat_prefix": name, "cluster": name}}]
            return {"filters": filters}, {"name": name, "connect_timeout": "10s"}
        listeners = {each["name"]: each for each in sent["listeners"]}
        if not self._is_server:
            filters = listeners[f"0.0.0.0_{service.port}"]["filter_chains"][0]["filters"]
            return {"filters": filters}, outbound_cluster(sent, service.port)
        chain = next(
            each
            for each in listeners["virtualInbound"]["filter_chains"]
            if each["name"] == f"0.0.0.0_{service.port}" and "transport_socket" in each
        )
        cluster = next(each for each in sent["clusters"] if each["name"] == f"inbound|{service.port}||")
        del cluster["upstream_bind_config"]  # an address, where the next one is a path
        return {key: chain[key] for key in ("filters", "transport_socket")}, cluster


def pipe(path: Path) -> dict[str, Any]:
    """A unix socket as Envoy writes it, open to all users."""
    return {"pipe": {"path": str(path), "mode": 0o777}}


def loopback(port: int) -> dict[str, Any]:
    """A port of 127.0.0.1 as Envoy writes it."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _plain(address: Json) -> Json:
    """Of who connects: without the mode."""
    return {"pipe": {"path": address["pipe"]["path"]}} if "pipe" in address else address
