"""A quick cut of `make matrix`: the programs that `make test` installs, with less to transfer."""

from collections.abc import Iterator

import pytest

from bpf.layout import LEVELS
from tests.matrix.bed import Bed, bed
from tests.matrix.cases import cases, run

CUT = (
    "redis/mtls",
    "grpc/http2",
    "asyncio/plain",
    "java/mtls",
    "node/first",
    "node-tls/plain",
    "node-http/http",
    "java-calls/http",
)
SEED, BIG = 1, 1_000_000


@pytest.fixture(scope="module")
def pods() -> Iterator[Bed]:
    with bed(("java",)) as made:
        yield made


@pytest.mark.parametrize("program", CUT)
def test_every_byte_arrives_at_every_level(pods: Bed, program: str) -> None:
    wanted = cases([f"{program}/{level}" for level in LEVELS])
    lines = {case.line(result): case.verdict(result) for case, result in run(pods, wanted, SEED, BIG)}
    assert len(lines) == 3
    assert not any(lines.values()), lines
