"""Values of all sizes there and back; the server speaks first. on_mariadb.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys

import aiomysql

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CLIENTS, ROWS = 3, 25


async def client(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    connection = await aiomysql.connect(host=HOST, port=PORT, user="root", db="mysql")
    cursor, moved = await connection.cursor(), 0
    await cursor.execute("create temporary table bodies (id int, body longblob)")
    for _ in range(ROWS):
        data = dice.randbytes(int(2 ** dice.uniform(0, 18)))
        await cursor.execute("select %s as body", (data,))
        assert (await cursor.fetchone())[0] == data, f"{len(data)} bytes came back as others"
        moved += 2 * len(data)
        await asyncio.sleep(dice.choice((0, 0, 0.001)))
    big = dice.randbytes(SIZE)
    await cursor.execute("insert into bodies values (0, %s)", (big,))
    await cursor.execute("select body from bodies")
    assert (await cursor.fetchone())[0] == big, "the big value is another"
    small = [dice.randbytes(each % 300) for each in range(1, 1000)]
    await cursor.executemany("insert into bodies values (%s, %s)", list(enumerate(small, 1)))
    streaming = await connection.cursor(aiomysql.SSCursor)  # reads rows when they are asked for
    await streaming.execute("select body from bodies where id > 0 order by id")
    for wanted in small:
        assert (await streaming.fetchone())[0] == wanted, "a row is another"
    assert await streaming.fetchone() is None
    await streaming.close()
    await connection.ensure_closed()
    return moved + 2 * SIZE + 2 * sum(map(len, small))


async def main() -> None:
    print(json.dumps({"bytes": sum(await asyncio.gather(*(client(number) for number in range(CLIENTS))))}))


asyncio.run(main())
