"""Runs in a pod whose image has grpc: `grpc_echo.py serve PORT`, or `grpc_echo.py ask HOST:PORT`.

The server answers one request with two messages, each of which tells who asked. The client prints a line of each.
It also says that it serves to whoever asks by gRPC's health checking protocol, as kubelet's probes do.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

_SERVICE, _METHOD = "sidestep.test.Echo", "Say"
_HEALTH = "grpc.health.v1.Health"
_SERVING = b"\x08\x01"  # HealthCheckResponse with its first field, the status, at SERVING
_PATIENCE = 10  # seconds


def serve(port: str) -> None:
    say = grpc.unary_stream_rpc_method_handler(_answers)
    check = grpc.unary_unary_rpc_method_handler(_is_healthy)
    handlers = [
        grpc.method_handlers_generic_handler(service, {method: handler})
        for service, method, handler in ((_SERVICE, _METHOD, say), (_HEALTH, "Check", check))
    ]
    server = grpc.server(ThreadPoolExecutor(4), handlers=handlers)
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    server.wait_for_termination()


def ask(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        for answer in channel.unary_stream(f"/{_SERVICE}/{_METHOD}")(b"", timeout=_PATIENCE):
            print(answer.decode())


def _answers(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    named = dict(context.invocation_metadata()).get("x-forwarded-client-cert", "")
    for number in range(2):
        yield json.dumps({"number": number, "caller": context.peer(), "identities": named}).encode()


def _is_healthy(_: bytes, __: grpc.ServicerContext) -> bytes:
    return _SERVING


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](sys.argv[2])
