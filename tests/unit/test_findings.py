"""What the probe says: when capture works, how the table is told, that the document names what the probe tries."""

import errno
import io
import re
from pathlib import Path

import pytest
import yaml

from bpf.hooks import HOOKS
from bpf.trees import Choice, given
from installer.probe import process
from installer.probe.attach_point import point_row
from installer.probe.findings import MINIMUM, NEEDS, Finding, Findings, NodeUnfit, Presence
from installer.probe.loading import map_kinds

KERNELS = Path(__file__).parents[2] / "docs" / "kernels.md"


def findings(*verdicts: Presence) -> Findings:
    return Findings(tuple(Finding("thing", "capture", "something", verdict, "do it") for verdict in verdicts))


@pytest.mark.parametrize(
    ("verdicts", "works", "summary"),
    [
        ((Presence.YES,), True, "capture will work"),
        ((Presence.YES, Presence.WARNING), True, "capture will work, with 1 warning"),
        ((Presence.YES, Presence.NO), False, "capture will not work here: of 2 things needed, 1 missing"),
        (
            (Presence.UNKNOWN, Presence.NO),
            False,
            "capture will not work here: of 2 things needed, 1 missing, 1 unknown",
        ),
        ((Presence.UNKNOWN,), False, "capture will not work here: of 1 things needed, 1 unknown"),
    ],
)
def test_capture_works_when_nothing_is_missing_or_unknown(
    verdicts: tuple[Presence, ...], works: bool, summary: str
) -> None:
    found = findings(*verdicts)
    assert (found.works, found.summary) == (works, summary)
    assert yaml.safe_load(yaml.safe_dump(found.document()))["works"] is works


@pytest.mark.parametrize("columns", ["80", "200", "nonsense"])
def test_no_word_of_a_table_is_lost(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = [f"w{number:03}" for number in range(120)]
    rows = [
        Finding("getpeername4", " ".join(words[:40]), " ".join(words[40:80]), Presence.NO, " ".join(words[80:])),
        Finding("CAP_NET_BROADCAST", "interceptionMode", "[bold] " + "/a/very/long/path" * 5, Presence.UNKNOWN, ""),
    ]
    table = Findings(tuple(rows)).table(io.StringIO())
    assert set(words) <= set(re.findall(r"w\d{3}", table))
    assert {"getpeername4", "CAP_NET_BROADCAST", "interceptionMode"} <= set(table.split())
    assert max(map(len, table.splitlines())) <= int(columns if columns.isdecimal() else 120)
    assert "[bold]" in table


def test_who_requires_what_is_missing_is_shown_the_table() -> None:
    findings(Presence.YES).require()
    with pytest.raises(NodeUnfit, match=r"^this node can't capture: thing something\n[\s\S]*what to do[\s\S]*do it"):
        findings(Presence.NO).require()


def test_what_is_missing_is_told_first_and_in_the_order_in_which_it_was_found() -> None:
    rows = [Finding(f"{verdict}{n}", "capture", "something", verdict) for n in (1, 2) for verdict in reversed(Presence)]
    found = Findings(tuple(rows))
    wanted = ["no1", "no2", "unknown1", "unknown2", "warning1", "warning2", "yes1", "yes2"]
    assert [row["what"] for row in found.document()["rows"]] == wanted
    assert [word for word in found.table(io.StringIO()).split() if word in wanted] == wanted


def refuse(*_: object) -> None:
    raise OSError(errno.ENOPROTOOPT, "Protocol not available")


@pytest.mark.parametrize(
    ("call", "what", "since"), [("own_cookie", "SO_NETNS_COOKIE", "5.14"), ("copy_of", "pidfd_getfd", "5.6")]
)
def test_a_system_call_that_the_kernel_lacks_is_a_no(
    call: str, what: str, since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row() -> Finding:
        return next(each for each in process.process() if each.what == what)

    assert (row().verdict, row().found, row().advice) == ("yes", "works", "")
    monkeypatch.setattr(process, call, refuse)
    assert (row().verdict, "Protocol not available" in row().found) == ("no", True)
    assert f"Linux {since} or newer" in row().advice


def test_there_is_no_column_for_advice_when_there_is_none() -> None:
    table = Findings((Finding("thing", "capture", "something", Presence.YES),)).table(io.StringIO())
    assert "what to do" not in table


def test_every_feature_has_a_reason_and_a_line_in_the_document() -> None:
    others = {"bpf_link", "SO_NETNS_COOKIE", "pidfd_getfd"}
    assert set(NEEDS) == {*map_kinds().values(), *(hook.name for hook in HOOKS), *others}
    assert max((need.since for need in NEEDS.values()), key=lambda since: [*map(int, since.split("."))]) == MINIMUM
    lines = KERNELS.read_text().splitlines()
    told = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("|")}
    # and the document has no others
    versions = {cells for cells in told if len(cells) == 3 and re.fullmatch(r"\d+\.\d+", cells[2])}
    assert {(need.label, need.needed_by, need.since) for need in NEEDS.values()} == versions
    assert f"Linux {MINIMUM}" in KERNELS.read_text()


def test_kubelet_on_version_1_of_a_hybrid_host(tmp_path: Path) -> None:
    """Its pods are in cgroup2's root, so an empty kubepods there catches nobody."""
    point, version1 = tmp_path / "kubepods", tmp_path / "cpu" / "kubepods"
    point.mkdir()
    (point / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    empty = point_row(given(point), tmp_path, [], version1)
    assert (empty.verdict, empty.advice) == (Presence.NO, f"--cgroup {tmp_path}")
    fresh = point_row(given(point), tmp_path, [], None)
    assert (fresh.verdict, "no process and no pod's cgroup is there" in fresh.found) == (Presence.WARNING, True)
    (point / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert point_row(given(point), tmp_path, [], version1).verdict is Presence.YES
    (tmp_path / "cgroup.procs").touch()
    root = point_row(
        Choice(tmp_path, f"the root: kubelet's pods are in cgroup v1 ({version1})"), tmp_path, [], version1
    )
    assert (root.verdict, str(version1) in root.found) == (Presence.YES, True)
