"""Copies of tables to and from Postgres by psql and libpq. by_psql.py HOST PORT SEED SIZE."""

import hashlib
import json
import random
import subprocess
import sys

HOST, PORT, SEED, SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
ROUNDS = 3


def psql(command: str, told: bytes = b"") -> bytes:
    where = ["-h", HOST, "-p", str(PORT), "-U", "matrix", "-d", "postgres"]
    argv = ["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", *where, "-c", command]
    return subprocess.run(argv, input=told, stdout=subprocess.PIPE, check=True, env={"PGSSLMODE": "disable"}).stdout


def main() -> None:
    dice = random.Random(SEED)
    moved = 0
    for _ in range(ROUNDS):
        lines = [dice.randbytes(dice.randint(1, 2000)).hex().encode() for _ in range(SIZE // 4000)]
        text = b"".join(each + b"\n" for each in lines)
        psql("create table copied (number serial, line text); copy copied (line) from stdin", text)
        assert psql("copy (select line from copied order by number) to stdout") == text, "the copy is another"
        psql("drop table copied")
        moved += 2 * len(text)
    made = psql(f"copy (select repeat(md5(i::text), 8) from generate_series(1, {SIZE // 300}) i) to stdout")
    wanted = b"".join(
        hashlib.md5(str(each).encode()).hexdigest().encode() * 8 + b"\n" for each in range(1, SIZE // 300 + 1)
    )
    assert made == wanted, "what the server made is another"
    print(json.dumps({"bytes": moved + len(made)}))


main()
