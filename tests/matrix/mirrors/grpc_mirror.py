"""A gRPC server of four methods, one for each kind of call, as on_grpc.py makes them: grpc_mirror.py PORT."""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc.aio

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PIECE = 5000


async def echo(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
    return request


async def talk(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for each in requests:
        yield each


async def join(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> bytes:
    return b"".join([each async for each in requests])


async def split(request: bytes, _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    for at in range(0, len(request), PIECE):
        yield request[at : at + PIECE]


async def main() -> None:
    server = grpc.aio.server(options=OPTIONS)
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
        "Join": grpc.stream_unary_rpc_method_handler(join),
        "Split": grpc.unary_stream_rpc_method_handler(split),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("matrix.Mirror", methods),))
    server.add_insecure_port(f"0.0.0.0:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
