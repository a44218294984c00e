"""Messages of all sizes through queues, which the server pushes to consumers. on_rabbitmq.py HOST PORT SEED SIZE."""

import asyncio
import json
import random
import sys

import aio_pika

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
QUEUES, MESSAGES = 2, 60


async def queue(number: int) -> int:
    dice = random.Random(f"{SEED} {number}")
    speaker, reader = [await aio_pika.connect(f"amqp://guest:guest@{HOST}:{PORT}/") for _ in range(2)]
    speaking, reading = await speaker.channel(), await reader.channel()
    await reading.set_qos(prefetch_count=7)
    queued = await reading.declare_queue(f"queue{number}", auto_delete=True)
    sizes = [int(2 ** dice.uniform(0, 18)) for _ in range(MESSAGES)]
    sent = [dice.randbytes(size) for size in (*sizes, SIZE, 1)]

    async def speak() -> None:
        for each in sent:
            await speaking.default_exchange.publish(aio_pika.Message(each), routing_key=queued.name)
            await asyncio.sleep(dice.choice((0, 0, 0.001)))

    task = asyncio.create_task(speak())
    async with queued.iterator(timeout=20) as messages:
        for at, wanted in enumerate(sent):
            message = await messages.__anext__()
            assert message.body == wanted, f"message {at} is another"
            await message.ack()
    await task
    await speaker.close()
    await reader.close()
    return 2 * sum(map(len, sent))


async def main() -> None:
    print(json.dumps({"bytes": sum(await asyncio.gather(*(queue(number) for number in range(QUEUES))))}))


asyncio.run(main())
