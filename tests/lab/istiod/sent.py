"""Envoy's configuration as istiod sends it to a sidecar, made static: no istiod is needed to run it.

The files beside this one are what a real istiod sent (`make renew-sent` renews them). Four things are changed: each
chain gets an access log that tests can read, certificates come from files, routes stand in their listeners, and what
istiod would look up among the endpoints of a Service goes to the connection's original destination.

Tests call pods by address, which is no Service's. So a TCP connection leaves the client's proxy as it came.
`with_tcp_service()` adds what istiod sends for the TCP port of a Service, made of the parts for its HTTP port.
`with_port_like()` adds another port of either kind.
"""

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# The Service whose pods were asked, and its ports. The application of a lab has HTTP and TCP; SERVER_FIRST is for what
# lets the server speak first.
SERVICE, HTTP, TCP, SERVER_FIRST = "server", 8080, 9001, 9000
SENT = {mode: Path(__file__).with_name(f"{mode.lower()}.json") for mode in ("REDIRECT", "TPROXY")}
LOG_FORMAT = {
    "source": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "original": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "upstream": "%UPSTREAM_HOST%",
    "upstream_source": "%UPSTREAM_LOCAL_ADDRESS%",
}
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_PROXY, _HTTP = (
    f"{_EXTENSIONS}.filters.network.{name}"
    for name in ("tcp_proxy.v3.TcpProxy", "http_connection_manager.v3.HttpConnectionManager")
)

_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
# as istiod sends it for ports that are named grpc or http2
_HTTP2 = {
    "@type": f"type.googleapis.com/{_OPTIONS}",
    "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 2147483647}},
}


def resources(mode: str, log: Path, identity: Path) -> Json:
    """Static resources of a bootstrap: listeners, clusters and secrets.

    `mode` is REDIRECT or TPROXY, `log` the file of all access logs, `identity` a directory with the proxy's certificate
    (cert.pem, key.pem) and the mesh's authority (ca.pem).
    """
    sent = copy.deepcopy(_sent(mode))
    routes = {each["name"]: each for each in sent["routes"]}
    for listener in sent["listeners"]:
        for connections in _filters(listener):
            connections["access_log"] = [_logger(log, listener["traffic_direction"].lower())]
            if rds := connections.pop("rds", None):
                connections["route_config"] = routes[rds["route_config_name"]]
    for each in sent["clusters"]:
        if each["type"] == "EDS":
            _go_to_original_destination(each)
    for each in _dicts(sent):
        each.pop("sds_config", None)  # a secret that has only a name is one of the bootstrap's
    return {"listeners": sent["listeners"], "clusters": sent["clusters"], "secrets": _secrets(identity)}


def with_tcp_service(static: Json) -> None:
    """Have calls of the TCP port leave by mTLS: tcp_proxy to a cluster of the Service, as istiod sends both."""
    http = next(each for each in static["clusters"] if each["name"].startswith(f"outbound|{HTTP}|"))
    cluster = json.loads(json.dumps(http).replace(f"|{HTTP}|", f"|{TCP}|").replace(f"_.{HTTP}._", f"_.{TCP}._"))
    static["clusters"].append(cluster)
    listener = copy.deepcopy(next(each for each in static["listeners"] if each["name"] == f"0.0.0.0_{HTTP}"))
    for address in (listener["address"], *(each["address"] for each in listener["additional_addresses"])):
        address["socket_address"]["port_value"] = TCP
    chain = listener.pop("default_filter_chain")
    settings = chain["filters"][0]["typed_config"]
    settings["cluster"] = settings["stat_prefix"] = cluster["name"]
    for inspecting in ("listener_filters", "listener_filters_timeout", "continue_on_listener_filters_timeout"):
        del listener[inspecting]
    listener |= {"name": f"0.0.0.0_{TCP}", "filter_chains": [{"filters": chain["filters"]}]}
    static["listeners"].append(listener)


def with_port_like(static: Json, model: int, port: int, http2: bool = False, secret: str = "default") -> None:
    """Add a port of the Service that is as the port `model`, which the configuration has in both directions.

    With `http2` the port is named so, or grpc, and both proxies speak HTTP/2 on. `secret` has the certificate that they
    show.
    """

    def is_models(each: Json) -> bool:
        return each.get("name") == f"0.0.0.0_{model}" or f"bound|{model}|" in each.get("name", "")

    def copied(each: Json) -> Json:
        text = re.sub(rf"(?<![0-9a-f]){model}(?![0-9a-f])", str(port), json.dumps(each))
        made: Json = json.loads(text)
        for part in _dicts(made):
            for named in part.get("tls_certificate_sds_secret_configs", ()):
                named["name"] = secret
        if http2 and "bound|" in made["name"]:
            made["typed_extension_protocol_options"] = {_OPTIONS: _HTTP2}
        return made

    inbound = next(each for each in static["listeners"] if each["name"] == "virtualInbound")
    for inspector in inbound["listener_filters"]:
        rules = inspector.get("filter_disabled", {}).get("or_match", {}).get("rules", [])
        if any(each["destination_port_range"]["start"] == model for each in rules):
            rules.append({"destination_port_range": {"start": port, "end": port + 1}})
    for parts in (static["listeners"], static["clusters"], inbound["filter_chains"]):
        parts += [copied(each) for each in parts if is_models(each)]


@cache
def _sent(mode: str) -> Json:
    return json.loads(SENT[mode].read_text())  # type: ignore[no-any-return]


def _filters(listener: Json) -> Iterator[Json]:
    """The settings of what ends the chains: TCP proxies and HTTP connection managers."""
    chains = [
        *listener["filter_chains"],
        *([listener["default_filter_chain"]] if "default_filter_chain" in listener else []),
    ]
    for chain in chains:
        for each in chain["filters"]:
            if each["typed_config"]["@type"] in (_PROXY, _HTTP):
                yield each["typed_config"]


def _logger(log: Path, direction: str) -> Json:
    settings = {
        "@type": f"{_EXTENSIONS}.access_loggers.file.v3.FileAccessLog",
        "path": str(log),
        "log_format": {"json_format": LOG_FORMAT | {"listener": direction}},
    }
    return {"name": "file", "typed_config": settings}


def _go_to_original_destination(cluster: Json) -> None:
    """With the TLS that istiod's endpoints would ask for; any identity of the mesh will do."""
    del cluster["eds_cluster_config"], cluster["common_lb_config"]
    cluster |= {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED"}
    (tls,) = [each["transport_socket"] for each in cluster.pop("transport_socket_matches") if each["match"]]
    validation = tls["typed_config"]["common_tls_context"]["combined_validation_context"]
    validation["default_validation_context"] = {"match_subject_alt_names": [{"prefix": "spiffe://"}]}
    cluster["transport_socket"] = tls


def _secrets(identity: Path) -> list[Json]:
    def file(name: str) -> Json:
        return {"filename": str(identity / name)}

    mine = {"certificate_chain": file("cert.pem"), "private_key": file("key.pem")}
    return [
        {"name": "default", "tls_certificate": mine},
        {"name": "ROOTCA", "validation_context": {"trusted_ca": file("ca.pem")}},
    ]


def _dicts(thing: Any) -> Iterator[Json]:
    """Every object in a tree."""
    if isinstance(thing, dict):
        yield thing
    for each in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        yield from _dicts(each)
