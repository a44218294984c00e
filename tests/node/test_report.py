"""`sidestep report`: a page of a node with traffic, opened in a real browser that has no network."""

import html
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bpf.layout import Cookie, Word
from bpf.pins import Pins
from bpf.tables import Tables
from tests.lab.chain import CniFailed
from tests.lab.command import sidestep, sidestep_json
from tests.lab.levels import set_level
from tests.lab.node import Node
from tests.lab.pod import Pod
from tests.lab.waiting import wait_until
from tests.node.conftest import Mesh

REFUSED = "traffic.sidecar.istio.io/excludeOutboundPorts"
LOAD = """
import http.client, json, sys, time
end, count = time.time() + 6, 0
connection = http.client.HTTPConnection(sys.argv[1], 8080)
while time.time() < end:
    connection.request("GET", "/")
    connection.getresponse().read()
    count += 1
    time.sleep(0.005)
print(json.dumps(count))
"""
DENIED = """
import errno, json, socket, sys
print(json.dumps([errno.errorcode[socket.socket().connect_ex((sys.argv[1], 2525))] for _ in range(3)]))
"""
# in a frame, because no window of chromium's is narrower than 500: the width there, and what is wider than its place
FRAME = """<!DOCTYPE html><body>
<iframe id="page" width="{width}" height="5000" style="border:0" srcdoc="{page}"></iframe>
<script>
document.getElementById("page").onload = event => {{
  const inner = event.target.contentDocument;
  const wide = [inner.documentElement, ...inner.querySelectorAll(".scroll, table, main, section")]
    .filter(each => each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== "none")
    .map(each => each.tagName + "#" + each.id + "." + each.className + " " + each.scrollWidth);
  document.body.dataset.measured = [inner.defaultView.innerWidth, ...wide].join(",");
}};
</script></body>"""
# a browser that asks anybody anything finds nobody
BROWSER = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
]


@pytest.fixture(scope="module")
def troubled(mesh: Mesh) -> Iterator[Mesh]:
    """Something is denied and something refused, and a map is a tenth full."""
    node = mesh.node
    mesh.alpha.annotations["sidestep.io/deny-outbound-ports"] = "2525"
    (node.pods_dir / "alpha.yaml").write_text(yaml.safe_dump(mesh.alpha.manifest()))
    wait_until(lambda: bool(sidestep_json(node, "deny")), "the port to be denied", 30)
    denied = mesh.alpha.python(DENIED, mesh.beta.ip4)
    assert denied == ["EPERM"] * 3
    bare = node.pod("bare", envoy=False)
    assert mesh.gamma.curl(bare.ip4).pod is None
    rows = [Cookie((1 << 63) + number) for number in range(410)]
    with Tables(Pins(node.bpffs)) as tables:
        for row in rows:
            tables.started.put(row, Word(1))
        yield mesh
        for row in rows:
            tables.started.remove(row)
    bare.stop()


def refuse_one(node: Node) -> None:
    """As kubelet and the agent do with a Pod whose annotation is wrong."""
    wrong = Pod(node, "wrong", annotations={REFUSED: "80-90"}, app=False, envoy=False)
    with pytest.raises(CniFailed):
        wrong.create()
    node.chain.delete(wrong.attachment)
    subprocess.run(["ip", "netns", "del", wrong.netns.name], check=True)


@pytest.fixture(scope="module")
def page(troubled: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "node.html"
    mesh = troubled
    set_level(mesh.node, "proxy")
    load = threading.Thread(target=mesh.alpha.python, args=(LOAD, mesh.beta.ip4))
    load.start()
    refuse_one(mesh.node)
    run_dir = ("--cni-agent-run-dir", mesh.node.run_dir)
    made = sidestep(mesh.node, "report", "--seconds", "1", "-f", path, *run_dir)
    load.join()
    assert (made.returncode, made.stdout, made.stderr) == (0, f"report: {path}\n", "")
    return path


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What the browser made of the page: its text, and what it had to complain about."""
    profile = tmp_path_factory.mktemp("profile")
    argv = [*BROWSER, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    shutil.rmtree(profile, ignore_errors=True)
    text = re.sub(r"<(style|script).*?</\1>", " ", done.stdout, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)), done.stderr


def test_it_asks_nobody_for_anything(page: Path) -> None:
    text = page.read_text().replace("http://www.w3.org/", "")  # names of XML's vocabularies
    for pattern in (
        r"""(?:src|href)\s*=\s*["']?(?![#"']|data:)""",
        r"""url\((?!["']?(?:#|data:))""",
        "@import",
        "https?://",
    ):
        assert re.findall(pattern, text) == [], pattern


def test_the_browser_has_nothing_to_complain_about(seen: tuple[str, str]) -> None:
    assert [line for line in seen[1].splitlines() if ":CONSOLE" in line or "ERR_" in line] == []


def test_pods_and_what_they_do_are_on_it(mesh: Mesh, seen: tuple[str, str]) -> None:
    text = seen[0]
    for expected in ("default/alpha", "default/beta", str(mesh.beta.ip4), "attached", "Who talks with whom", "Maps"):
        assert expected in text
    assert re.search(r"default/alpha default/beta 8080 proxy → proxy", text)
    redirected = re.search(r"Redirected from socket to socket, past TCP ([0-9,.]+) ([0-9,]+)", text)
    assert redirected is not None
    assert int(redirected[2].replace(",", "")) > 100


def test_what_was_denied_and_refused_is_told_by_reason(seen: tuple[str, str]) -> None:
    for reason, pod, least in (
        ("outbound: to a port that the pod denies", "default/alpha", 3),
        ("inbound: captured, but no proxy listens on port 15006", "default/bare", 1),
    ):
        row = re.search(rf"{re.escape(reason)} {pod} ([0-9.,<]+) ([0-9,]+)", seen[0])
        assert row is not None, reason
        assert int(row[2].replace(",", "")) >= least
    assert "default/bare" in seen[0].partition("Who talks with whom")[0]  # its proxy does not listen: the verdict


def test_what_went_past_the_proxies_is_listed_with_the_reason(seen: tuple[str, str]) -> None:
    text = " ".join(seen[0].split())
    assert "Past the proxies" in text and "refused: the pod denies this port" in text


def test_what_connections_carry_is_listed(mesh: Mesh, seen: tuple[str, str]) -> None:
    row = re.search(rf"default/alpha {re.escape(str(mesh.beta.ip4))}:8080 (\d+) (\d+) [0-9.]+ ([KM]i)?B ", seen[0])
    assert row is not None and int(row[1]) >= 1
    assert re.search(r"default/beta inbound, port 8080 \d+ \d+ ", seen[0])


def test_pods_that_were_refused_are_listed_with_the_reason(mesh: Mesh, seen: tuple[str, str]) -> None:
    assert "refused, so they don't start: default/wrong" in seen[0]
    assert re.search(rf'Refused pods .* default/wrong {REFUSED} {REFUSED}: "80-90" is not a port; .* 20\d\d-', seen[0])
    found = sidestep_json(mesh.node, "report", "--seconds", "0.1", "--cni-agent-run-dir", mesh.node.run_dir)
    assert [each["pod"] for each in found["refused_pods"]["refused"]] == ["default/wrong"]


def test_how_full_a_map_is_is_told_in_percent(seen: tuple[str, str]) -> None:
    assert re.search(r" started 41[0-9] 4,096 10 % ", seen[0]), seen[0][-1500:]
    assert re.search(r" pods 3 4,096 &lt;0\.1 % ", seen[0])


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_programs_are_told_the_same(troubled: Mesh, output: str, tmp_path: Path) -> None:
    path = tmp_path / "node"
    made = sidestep(troubled.node, "report", "--seconds", "0.1", "--output", output, "-f", path)
    assert (made.returncode, made.stdout, made.stderr) == (0, f"report: {path}\n", "")
    found = yaml.safe_load(path.read_text())
    assert (found["attached"], found["blind"], found["unseen"]) == (True, "", {})
    pods = {each["pod"]: each for each in found["pods"]}
    assert list(pods) == ["default/alpha", "default/bare", "default/beta"]
    assert pods["default/alpha"]["total"]["connections"]["outbound"]["denied"] >= 3
    assert pods["default/bare"]["is_proxy_listening"] is False
    assert {each["name"]: each["entries"] for each in found["maps"]}["pods"] == 3
    assert sidestep_json(troubled.node, "report", "--seconds", "0.1")["node"] == found["node"]


def test_a_page_that_cannot_be_written_leaves_nothing_behind(troubled: Mesh, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", full], check=True)
    try:
        done = sidestep(troubled.node, "report", "--seconds", "0.1", "-f", full / "node.html")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"cannot write {full}/node.html: No space left on device" in done.stderr
        assert list(full.iterdir()) == []
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_scrolls_sideways(page: Path, tmp_path: Path, width: int) -> None:
    measured = tmp_path / "measured.html"
    measured.write_text(FRAME.format(width=width, page=html.escape(page.read_text())))
    argv = [*BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1200", "--dump-dom"]
    done = subprocess.run([*argv, measured.as_uri()], check=True, capture_output=True, text=True, timeout=60)
    told = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert told is not None
    inner, *too_wide = told[1].split(",")
    assert (int(inner), [each for each in too_wide if each]) == (width, [])


def test_an_empty_node_has_a_page_too(node: Node, tmp_path: Path) -> None:
    made = sidestep(node, "report", "--seconds", "0.1")
    assert made.returncode == 0
    assert made.stdout.startswith("<!doctype html>") or made.stdout.startswith("<!DOCTYPE html>")


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "not" / "there.html"


def test_a_place_that_is_not_there_is_one_line(mesh: Mesh, nowhere: Path) -> None:
    done = sidestep(mesh.node, "report", "--seconds", "0.1", "-f", nowhere)
    assert done.returncode == 1
    assert done.stderr.startswith("sidestep: ") and done.stderr.count("\n") == 1 and str(nowhere) in done.stderr
