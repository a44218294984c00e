"""Messages of all sizes, and requests; the server speaks first. on_nats.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
LARGEST, REQUESTS = 900_000, 30


def connecting() -> Client:
    return nats.connect(f"nats://{HOST}:{PORT}")


async def until_subscribed(client: Client) -> None:
    """The library may send a flush's PING before the subscription; before the next one's it has sent both."""
    await client.flush()
    await client.flush()


async def news(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    speaker, reader = await connecting(), await connecting()
    subscription = await reader.subscribe(f"news{number}")
    await until_subscribed(reader)
    sent, moved = [], 0
    while moved < SIZE:
        sent.append(dice.randbytes(min(LARGEST, int(2 ** dice.uniform(0, 20)))))
        moved += len(sent[-1])

    async def speak() -> None:
        for each in sent:
            await speaker.publish(f"news{number}", each)
            await asyncio.sleep(dice.choice((0, 0, 0.001)))
        await speaker.flush()

    speaking = asyncio.create_task(speak())
    for at, wanted in enumerate(sent):
        got = await subscription.next_msg(timeout=15)
        assert got.data == wanted, f"message {at} is another"
    await speaking
    await speaker.close()
    await reader.close()
    return 2 * moved


async def asked() -> int:
    dice = random.Random(SEED)
    asker, answerer = await connecting(), await connecting()

    async def answer(message: Msg) -> None:
        await message.respond(message.data[::-1])

    await answerer.subscribe("question", cb=answer)
    await until_subscribed(answerer)
    moved = 0
    for _ in range(REQUESTS):
        data = dice.randbytes(int(2 ** dice.uniform(0, 17)))
        answer_to = await asker.request("question", data, timeout=15)
        assert answer_to.data == data[::-1], f"an answer of {len(data)} bytes is another"
        moved += 4 * len(data)
    await asker.close()
    await answerer.close()
    return moved


async def main() -> None:
    print(json.dumps({"bytes": sum(await asyncio.gather(asked(), news(1), news(2)))}))


asyncio.run(main())
