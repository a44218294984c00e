"""Values of all sizes, pipelines, and messages that the server pushes. on_redis.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys

import redis.asyncio

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CLIENTS, VALUES, NEWS = 3, 40, 50


async def client(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    server, moved = redis.asyncio.Redis(host=HOST, port=PORT), 0
    sizes = [int(2 ** dice.uniform(0, 18)) for _ in range(VALUES)]
    for size in (*sizes, SIZE):
        data = dice.randbytes(size)
        await server.set(f"value{number}", data)
        assert await server.get(f"value{number}") == data, f"{size} bytes came back as others"
        moved += 2 * size
        await asyncio.sleep(dice.choice((0, 0, 0.001)))
    small = [dice.randbytes(each % 200) for each in range(1000)]
    pipeline = server.pipeline(transaction=False)
    for each in small:
        pipeline.echo(each)
    assert await pipeline.execute() == small, "answers of the pipeline are others"
    await server.close()
    return moved + 2 * sum(map(len, small))


async def news() -> int:
    """What one publishes, another gets without asking."""
    dice = random.Random(SEED)
    speaker, reader = (redis.asyncio.Redis(host=HOST, port=PORT) for _ in range(2))
    subscription = reader.pubsub(ignore_subscribe_messages=True)
    await subscription.subscribe("news")
    await subscription.get_message(timeout=5)
    sent = [dice.randbytes(int(2 ** dice.uniform(0, 16))) for _ in range(NEWS)]

    async def speak() -> None:
        for each in sent:
            await speaker.publish("news", each)
            await asyncio.sleep(dice.choice((0, 0, 0.002)))

    speaking = asyncio.create_task(speak())
    for number, wanted in enumerate(sent):
        got = None
        while got is None:
            got = await subscription.get_message(timeout=10)
        assert got["data"] == wanted, f"message {number} is another"
    await speaking
    await speaker.close()
    await reader.close()
    return 2 * sum(map(len, sent))


async def main() -> None:
    done = await asyncio.gather(news(), *(client(number) for number in range(CLIENTS)))
    print(json.dumps({"bytes": sum(done)}))


asyncio.run(main())
