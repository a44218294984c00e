"""What is asked of every pair: which program generates the load, over how many connections, and what it asks for."""

from dataclasses import dataclass
from enum import StrEnum

PING = 64  # bytes of a ping-pong's request body


class Generator(StrEnum):
    """Programs that others have written and trust."""

    WRK = "wrk"
    H2LOAD = "h2load"
    IPERF3 = "iperf3"


@dataclass(frozen=True)
class Workload:
    """One kind of load."""

    name: str
    title: str
    generator: Generator
    service: str
    connections: int = 1
    path: str = ""
    is_closing: bool = False  # a new connection for each request
    write_size: int = 0  # bytes of each write() of a stream


# By service, what its Envoys do, as titles have it.
_ENVOYS = {
    "http": "HTTP, mTLS",
    "mtls": "tcp_proxy, mTLS",
    "mtls-ecdsa": "tcp_proxy, mTLS with ECDSA",
    "tcp": "tcp_proxy",
}


def _keepalive(service: str, connections: int) -> Workload:
    title = f"keep-alive, {connections} conn., {_ENVOYS[service]}"
    return Workload(f"keepalive-{connections}-{service}", title, Generator.WRK, service, connections)


def _body(service: str, path: str, size: str) -> Workload:
    title = f"{size} bodies, 32 conn., {_ENVOYS[service]}"
    return Workload(f"body-{path}-{service}", title, Generator.WRK, service, 32, path)


def _new(service: str) -> Workload:
    title = f"new connection per request, 32 clients, {_ENVOYS[service]}"
    return Workload(f"new-connection-{service}", title, Generator.WRK, service, 32, is_closing=True)


def _requests(service: str) -> list[Workload]:
    """Of all kinds."""
    loads = [_keepalive(service, connections) for connections in (1, 32, 256)]
    loads += [_body(service, "64k", "64 KiB"), _body(service, "1m", "1 MiB"), _new(service)]
    title = f"gRPC-like ping-pong, {_ENVOYS[service]}"
    return [*loads, Workload(f"ping-pong-{service}", title, Generator.H2LOAD, f"{service}-h2")]


def _stream(size: int, title: str) -> Workload:
    return Workload(f"stream-{size}", f"stream, writes of {title}", Generator.IPERF3, "stream", write_size=size)


# What Istio does with most traffic comes first.
WORKLOADS = {
    each.name: each
    for each in (
        *_requests("http"),
        _keepalive("mtls", 32),
        _body("mtls", "64k", "64 KiB"),
        _new("mtls"),
        _new("mtls-ecdsa"),
        *_requests("tcp"),
        _stream(64, "64 B"),
        _stream(1 << 10, "1 KiB"),
        _stream(16 << 10, "16 KiB"),
        _stream(256 << 10, "256 KiB"),
    )
}
