"""Rows of all sizes there and back, and notifications. on_postgres.py HOST PORT SEED SIZE."""

import asyncio
import hashlib
import json
import random
import sys

import asyncpg

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CLIENTS, ROWS, NOTES = 3, 25, 20


def connecting() -> asyncpg.Connection:
    return asyncpg.connect(host=HOST, port=PORT, user="matrix", database="postgres", ssl=False)


async def client(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    connection, moved, table = await connecting(), 0, f"rows{number}"
    await connection.execute(f"create temporary table {table} (id int, body bytea)")
    for _ in range(ROWS):
        data = dice.randbytes(int(2 ** dice.uniform(0, 18)))
        assert await connection.fetchval("select $1::bytea", data) == data, f"{len(data)} bytes came back as others"
        moved += 2 * len(data)
        await asyncio.sleep(dice.choice((0, 0, 0.001)))
    big = dice.randbytes(SIZE)
    await connection.execute(f"insert into {table} values (1, $1)", big)
    assert await connection.fetchval(f"select body from {table} where id = 1") == big, "the big row is another"
    records = [(each, dice.randbytes(each % 300)) for each in range(2000)]
    await connection.copy_records_to_table(table, records=records)
    wanted = [each[1] for each in records[2:]]
    async with connection.transaction():  # a cursor, which asks for some rows at a time
        rows = connection.cursor(f"select body from {table} where id > 1 order by id", prefetch=37)
        assert [row["body"] async for row in rows] == wanted, "rows of the cursor are others"
    # one question, and the server sends as fast as it can
    sums = await connection.fetch("select repeat(md5(i::text), 8) as t from generate_series(1, $1) i", SIZE // 300)
    made = [hashlib.md5(str(each).encode()).hexdigest() * 8 for each in range(1, SIZE // 300 + 1)]
    assert [row["t"] for row in sums] == made, "rows that the server made are others"
    await connection.close()
    return moved + 2 * SIZE + len(sums) * 260


async def notified() -> int:
    """What the server says by itself, to who has asked for nothing meanwhile."""
    listener, speaker = await connecting(), await connecting()
    seen: asyncio.Queue[str] = asyncio.Queue()
    await listener.add_listener("news", lambda *each: seen.put_nowait(each[3]))
    for number in range(NOTES):
        text = f"{number} " + "x" * (number * 350)
        await speaker.execute("select pg_notify('news', $1)", text)
        assert await asyncio.wait_for(seen.get(), 10) == text, f"notification {number} is another"
    await listener.close()
    await speaker.close()
    return NOTES


async def main() -> None:
    done = await asyncio.gather(notified(), *(client(number) for number in range(CLIENTS)))
    print(json.dumps({"bytes": sum(done)}))


asyncio.run(main())
