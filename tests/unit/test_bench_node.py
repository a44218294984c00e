"""What the node's bench says of a figure, and how it ends."""

import pytest
from click.testing import CliRunner

from tests.bench import node
from tests.bench.node import Figure


def test_a_figure_stands_beside_its_aim() -> None:
    assert str(Figure("ready, warm", 1.805, "s", 2, "1.18–3.66")) == "  ready, warm: 1.80 s (1.18–3.66); aim 2 s, met"
    assert str(Figure("idle", 0.51, "% of a core", 0.5)).endswith("aim 0.5 % of a core, MISSED")


@pytest.mark.parametrize(("memory", "status"), [(96.0, 0), (96.1, 1)])
def test_a_missed_aim_fails_the_bench(monkeypatch: pytest.MonkeyPatch, memory: float, status: int) -> None:
    monkeypatch.setattr(
        node, "measured", lambda: ([Figure("ready", 1, "s", 2), Figure("resident", memory, "MiB", 96)], 0)
    )
    done = CliRunner().invoke(node.bench)
    assert done.exit_code == status
    assert f"resident: {memory:.2f} MiB; aim 96 MiB" in done.output
