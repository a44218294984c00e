"""Calls a mirror: connections of all shapes at once, each byte compared. mirrored.py HOST PORT SEED SIZE [greeted|tls].

SIZE is how much a big transfer has. Sizes and pauses follow from the seed. The first bytes of a connection come in
pieces; with `tls` these are the ClientHello's.
"""

import asyncio
import json
import random
import ssl
import sys
from collections.abc import Coroutine
from typing import Any

from tests.matrix.mirrors.mirror import pattern

HOST, PORT, SEED, SIZE, HOW = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
PIECES = 8
DRIBBLES, BURSTS = 4, 3  # connections of each kind


class Plain:
    """A connection as it is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> bytes:
        return await self.reader.read(random.choice((1000, 65536, 262144)))

    async def end(self) -> None:
        self.writer.write_eof()


class Secured(Plain):
    """TLS of the application's own, whose ClientHello leaves in pieces."""

    async def begin(self) -> "Secured":
        self.coming, self.going = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.tls = context.wrap_bio(self.coming, self.going, server_hostname="server")
        self.hello = True
        while not await self._advanced(self.tls.do_handshake):
            pass
        await self._flush()
        return self

    async def _advanced(self, step: object) -> bool:
        try:
            step()  # type: ignore[operator]
        except ssl.SSLWantReadError:
            await self._flush()
            self.coming.write(await self.reader.read(65536) or sys.exit("the end in the handshake"))
            return False
        return True

    async def _flush(self) -> None:
        data = self.going.read()
        size = -(-len(data) // PIECES) if self.hello else len(data)
        self.hello = self.hello and not data
        for at in range(0, len(data), size or 1):
            await super().send(data[at : at + size])
            await asyncio.sleep(0.002 if size < len(data) else 0)

    async def send(self, data: bytes) -> None:
        for at in range(0, len(data), 16384):
            self.tls.write(data[at : at + 16384])
        await self._flush()

    async def receive(self) -> bytes:
        while True:
            try:
                return self.tls.read(65536)
            except ssl.SSLWantReadError:
                data = await self.reader.read(65536)
                if not data:
                    return b""
                self.coming.write(data)
            except ssl.SSLZeroReturnError:
                return b""

    async def end(self) -> None:
        """TLS has no half that closes; who echoes by TLS is told how much there is by nobody, so the end is the end."""


async def opened() -> Plain:
    connection = Plain(*await asyncio.open_connection(HOST, PORT))
    if "tls" in HOW:
        return await Secured(connection.reader, connection.writer).begin()
    if "greeted" in HOW:
        assert await connection.reader.readline() == b"hello\n", "no greeting"
    return connection


async def receive_exactly(connection: Plain, wanted: bytes, dice: random.Random, begun: asyncio.Event) -> None:
    """Every byte in its place; the reader is slow at times, and leaves it to the sender to stop."""
    got = 0
    while got < len(wanted):
        data = await connection.receive()
        if not data:
            raise ConnectionError(f"the end after {got} of {len(wanted)} bytes")
        assert data == wanted[got : got + len(data)], f"wrong bytes among the {len(data)} from {got} on"
        got += len(data)
        begun.set()
        if dice.random() < 0.02:
            await asyncio.sleep(0.02)


async def ends(connection: Plain) -> None:
    if isinstance(connection, Secured):
        connection.writer.close()
        return
    assert await connection.receive() == b"", "more than there should be"


async def echo(number: int, sizes: list[int], pause: float) -> int:
    """So many pieces there, each at its time, and all of them back."""
    dice = random.Random(f"{SEED} {number}")
    data = dice.randbytes(sum(sizes))
    connection, begun = await opened(), asyncio.Event()

    async def send() -> None:
        await connection.send(b"@echo ")  # its line comes in pieces too
        await connection.send(b"0\n")
        at = 0
        for size in sizes:
            await connection.send(data[at : at + size])
            at += size
            if dice.random() < 0.5:
                await asyncio.sleep(pause)
        await begun.wait()  # an Envoy resets a connection whose end comes while its inspectors still look
        await connection.end()

    await asyncio.gather(send(), receive_exactly(connection, data, dice, begun))
    await ends(connection)
    return 2 * len(data)


async def push(size: int) -> int:
    """The server sends, and closes its half first."""
    connection = await opened()
    await connection.send(b"@push %d\n" % size)
    await receive_exactly(connection, pattern(0, size), random.Random(SEED), asyncio.Event())
    await ends(connection)
    if not isinstance(connection, Secured):
        await connection.send(b"a last word")
        await connection.end()
    connection.writer.close()
    return size


async def take(size: int, pieces: int) -> int:
    """A big upload, which the server compares; `pieces` is how many bytes leave at a time."""
    connection = await opened()
    await connection.send(b"@take 0\n")
    assert await connection.reader.readexactly(5) == b"take\n"  # the inspectors have looked, see echo()
    data = pattern(0, size)
    for at in range(0, size, pieces):
        await connection.send(data[at : at + pieces])
    await connection.end()
    said = await connection.reader.read()
    assert said == b"took %d 1\n" % size, f"uploaded {size} bytes, and the server said {said!r}"
    return size


async def main() -> None:
    dice = random.Random(SEED)
    random.seed(SEED)
    calls: list[Coroutine[Any, Any, int]] = []
    for _ in range(DRIBBLES):
        calls.append(echo(len(calls), [dice.randint(1, 7) for _ in range(60)], 0.001))
    for _ in range(BURSTS):
        sizes: list[int] = []
        while sum(sizes) < SIZE // 4:
            sizes.append(int(2 ** dice.uniform(0, 17)))
        calls.append(echo(len(calls), sizes, dice.choice((0.0, 0.0005, 0.002))))
    calls += [push(SIZE // 2), push(1)]
    if "tls" not in HOW:
        calls += [take(SIZE, 1 << 20), take(SIZE // 2, 10_000), take(0, 1)]
    print(json.dumps({"bytes": sum(await asyncio.gather(*calls)), "calls": len(calls)}))


asyncio.run(main())
