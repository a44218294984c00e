"""Calls an HTTP mirror by aiohttp: bodies of all sizes, whole and in pieces. over_http.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator

import aiohttp

from tests.matrix.mirrors.mirror import pattern

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CLIENTS, SMALL = 4, 15


async def dribbled(data: bytes, dice: random.Random) -> AsyncIterator[bytes]:
    at = 0
    while at < len(data):
        size = int(2 ** dice.uniform(0, 16))
        yield data[at : at + size]
        at += size
        await asyncio.sleep(dice.choice((0, 0, 0.001)))


async def echo(session: aiohttp.ClientSession, data: bytes, in_pieces: random.Random | None = None) -> int:
    body = dribbled(data, in_pieces) if in_pieces else data
    async with session.post(f"http://{HOST}:{PORT}/echo", data=body) as response:
        got = await response.read()
    assert response.status == 200, response.status
    assert got == data, f"sent {len(data)} bytes, got {len(got)}, which are others"
    return 2 * len(data)


async def push(session: aiohttp.ClientSession, size: int, dice: random.Random) -> int:
    async with session.get(f"http://{HOST}:{PORT}/push?{size}") as response:
        got = bytearray()
        async for data in response.content.iter_any():
            got += data
            if dice.random() < 0.02:
                await asyncio.sleep(0.02)
    assert got == pattern(0, size), f"asked for {size} bytes, got {len(got)}, which are others"
    return size


async def client(number: int) -> int:
    """Requests of one connection, one after another."""
    dice = random.Random(f"{SEED} {number}")
    moved = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        session.headers["Host"] = "server"  # the Service's name, by which the client's proxy routes
        for _ in range(SMALL):
            moved += await echo(session, dice.randbytes(int(2 ** dice.uniform(0, 14))))
        moved += await echo(session, dice.randbytes(SIZE // 8), dice)
        moved += await push(session, SIZE // 2, dice)
        moved += await echo(session, dice.randbytes(SIZE // 2))
        moved += await echo(session, dice.randbytes(SIZE // 4))
    return moved


async def main() -> None:
    print(json.dumps({"bytes": sum(await asyncio.gather(*(client(number) for number in range(CLIENTS))))}))


asyncio.run(main())
