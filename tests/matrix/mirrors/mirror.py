"""A mirror on asyncio; README.md says what it does. Runs in a pod: mirror.py PORT [greets] [CERTIFICATE KEY]."""

import asyncio
import ssl
import sys

PIECES = (1, 7, 100, 1460, 4096, 16384, 65536, 3)


def make_block() -> bytes:
    x, block = 1, bytearray()
    for _ in range(65521):
        x = (x * 1664525 + 1013904223) & 0xFFFFFFFF
        block.append(x >> 24)
    return bytes(block)


BLOCK = make_block()


def pattern(at: int, size: int) -> bytes:
    start = at % len(BLOCK)
    return (BLOCK * (2 + size // len(BLOCK)))[start : start + size]


async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if "greets" in sys.argv:
        writer.write(b"hello\n")
    mode, size = (await reader.readline()).split()
    if mode == b"@echo":
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    elif mode == b"@push":
        sent = pieces = 0
        while sent < int(size):
            data = pattern(sent, min(PIECES[pieces % 8], int(size) - sent))
            writer.write(data)
            await writer.drain()
            sent, pieces = sent + len(data), pieces + 1
            if pieces % 8 == 0:
                await asyncio.sleep(0.001)
    elif mode == b"@take":
        writer.write(b"take\n")
        taken, good = 0, 1
        while data := await reader.read(65536):
            good &= data == pattern(taken, len(data))
            taken += len(data)
        writer.write(b"took %d %d\n" % (taken, good))
    if writer.can_write_eof():
        writer.write_eof()
    await reader.read()
    writer.close()


async def main() -> None:
    context = None
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[-2], sys.argv[-1])
    server = await asyncio.start_server(mirror, "0.0.0.0", int(sys.argv[1]), ssl=context)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
