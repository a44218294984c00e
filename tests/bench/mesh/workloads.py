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


def _http(variant: str) -> list[Workload]:
    proxy = {"tcp": "tcp_proxy", "http": "HTTP"}[variant]
    loads = [
        Workload(f"keepalive-{n}-{variant}", f"keep-alive, {n} conn., {proxy}", Generator.WRK, variant, n)
        for n in (1, 32, 256)
    ]
    loads += [
        Workload(f"body-{path}-{variant}", f"{size} bodies, 32 conn., {proxy}", Generator.WRK, variant, 32, path)
        for path, size in (("64k", "64 KiB"), ("1m", "1 MiB"))
    ]
    name, title = f"new-connection-{variant}", f"new connection per request, 32 clients, {proxy}"
    loads.append(Workload(name, title, Generator.WRK, variant, 32, is_closing=True))
    name, title = f"ping-pong-{variant}", f"gRPC-like ping-pong, {proxy}"
    loads.append(Workload(name, title, Generator.H2LOAD, f"{variant}-h2"))
    return loads


def _stream(size: int, title: str) -> Workload:
    return Workload(f"stream-{size}", f"stream, writes of {title}", Generator.IPERF3, "stream", write_size=size)


WORKLOADS = {
    each.name: each
    for each in (
        *_http("tcp"),
        *_http("http"),
        _stream(64, "64 B"),
        _stream(1 << 10, "1 KiB"),
        _stream(16 << 10, "16 KiB"),
        _stream(256 << 10, "256 KiB"),
    )
}
