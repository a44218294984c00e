"""gRPC's four kinds of calls, on its own C core. on_grpc.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator

import grpc.aio

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
UNARY, PARTS = 30, 40
# The Service's name, by which the client's proxy routes
OPTIONS = [
    ("grpc.default_authority", "server"),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


async def client(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    async with grpc.aio.insecure_channel(f"{HOST}:{PORT}", options=OPTIONS) as channel:
        moved = 0
        echo = channel.unary_unary("/matrix.Mirror/Echo")
        for size in (*(int(2 ** dice.uniform(0, 17)) for _ in range(UNARY)), SIZE):
            data = dice.randbytes(size)
            assert await echo(data, timeout=20) == data, f"{size} bytes came back as others"
            moved += 2 * size
        parts = [dice.randbytes(int(2 ** dice.uniform(0, 17))) for _ in range(PARTS)]

        async def dribbled() -> AsyncIterator[bytes]:
            for each in parts:
                yield each
                await asyncio.sleep(dice.choice((0, 0, 0.001)))

        talk = channel.stream_stream("/matrix.Mirror/Talk")(dribbled(), timeout=20)
        assert [each async for each in talk] == parts, "parts came back as others"
        joined = await channel.stream_unary("/matrix.Mirror/Join")(dribbled(), timeout=20)
        assert joined == b"".join(parts), "what the server joined is another"
        split = channel.unary_stream("/matrix.Mirror/Split")(joined, timeout=20)
        assert b"".join([each async for each in split]) == joined, "what the server split is another"
    return moved + 5 * len(joined)


async def main() -> None:
    print(json.dumps({"bytes": sum(await asyncio.gather(client(1), client(2)))}))


asyncio.run(main())
