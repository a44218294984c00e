"""What the plugin lets go without an agent, and what the agent would: one table of cases for both."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cni.errors import CniError
from cni.policy.membership import skip_unseen
from cni.protocol import NetworkConfig, Passed, decode, pod_args, receive_message

pytestmark = pytest.mark.usefixtures("shim")
SHIM = Path(__file__).parents[2] / "build" / "sidestep-cni"
PREVIOUS = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}], "x-unknown": 2**53 + 1}
MESH = {"sidecar.istio.io/status": "{}", "other": "x"}
PLAIN = {"kubernetes.io/config.source": "api"}
POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod;K8S_POD_UID=u;X=y"
NOT_KNOWN = object()

# CNI_ARGS, what the runtime says of the annotations, and why the pod is let go (None: it is not)
CASES: dict[str, tuple[str, Any, str | None]] = {
    "a mesh pod": (POD, MESH, None),
    "a plain pod": (POD, PLAIN, "no sidecar.istio.io/status annotation"),
    "a plain pod without any annotation": (POD, {}, "no sidecar.istio.io/status annotation"),
    "annotations that the runtime did not set": (POD, None, None),
    "a runtime that passes none": (POD, NOT_KNOWN, None),
    "a status that is empty": (POD, {"sidecar.istio.io/status": ""}, None),
    "annotations that are none": (POD, {"other": 7}, None),
    "a status that is none": (POD, {"sidecar.istio.io/status": None}, None),
    "annotations of another shape": (POD, ["other"], None),
    "no Kubernetes pod": ("", NOT_KNOWN, "not a Kubernetes pod"),
    "no name": ("K8S_POD_NAMESPACE=default", MESH, "not a Kubernetes pod"),
    "an empty name": ("K8S_POD_NAMESPACE=default;K8S_POD_NAME=", MESH, "not a Kubernetes pod"),
    "no namespace": ("K8S_POD_NAME=pod", MESH, "not a Kubernetes pod"),
    "an excluded namespace": ("K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=pod", MESH, "exclude_namespaces"),
    "a namespace like an excluded one": ("K8S_POD_NAMESPACE=kube-system2;K8S_POD_NAME=pod", MESH, None),
    "the agent's own pod": ("K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istio-cni-node-x7", NOT_KNOWN, "own pod"),
    "one in shadow mode": ("K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=sidestep-shadow-node-x7", NOT_KNOWN, "own pod"),
    "its name elsewhere": ("K8S_POD_NAMESPACE=default;K8S_POD_NAME=istio-cni-node-x7", MESH, None),
    "another pod there": ("K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istiod-istio-cni-node-", MESH, None),
    "the last of two names": (f"{POD};K8S_POD_NAMESPACE=kube-system", MESH, "exclude_namespaces"),
    "unknown arguments": ("K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod;X=y", PLAIN, None),
    "unknown arguments and no pod": ("X=y", NOT_KNOWN, None),
    "no pair": ("K8S_POD_NAMESPACE=default;nonsense", PLAIN, None),
    "an argument without a key": (f"{POD};=x", PLAIN, "no sidecar.istio.io/status annotation"),
    "nothing between two": (f"{POD};;", PLAIN, "no sidecar.istio.io/status annotation"),
    "a text that goes on after a zero": ("K8S_POD_NAMESPACE=kube-node;K8S_POD_NAME=pod", MESH, None),
    "any order": ("K8S_POD_NAME=pod;X=y;K8S_POD_NAMESPACE=kube-system;IgnoreUnknown=true", MESH, "exclude_namespaces"),
}


def config(annotations: Any, run_dir: Path = Path("/never")) -> dict[str, Any]:
    made: dict[str, Any] = {
        "cniVersion": "1.1.0",
        "name": "net",
        "type": "sidestep-cni",
        "cni_agent_run_dir": str(run_dir),
        "agent_timeout_seconds": 0.1,  # ADD waits that long for an agent that is away
        "pod_namespace": "istio-system",
        "exclude_namespaces": ["kube-public", "kube-system", "kube-node\0lease"],
        "prevResult": PREVIOUS,
        "cni.dev/valid-attachments": [],
    }
    if annotations is not NOT_KNOWN:
        made["runtimeConfig"] = {"io.kubernetes.cri.pod-annotations": annotations}
    return made


def run(command: str, args: str, stdin: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/proc/self/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": args,
    }
    return subprocess.run([SHIM], env=environment, input=json.dumps(stdin), capture_output=True, text=True, timeout=10)


@pytest.mark.parametrize("case", CASES)
def test_without_an_agent_only_what_is_plainly_not_in_the_mesh_starts(case: str) -> None:
    args, annotations, why = CASES[case]
    done = run("ADD", args, config(annotations))
    if why:
        assert (done.returncode, json.loads(done.stdout)) == (0, PREVIOUS)
        assert why in done.stderr
    else:
        assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)


@pytest.mark.parametrize("case", CASES)
def test_the_agent_goes_by_the_same_rules(case: str) -> None:
    args, annotations, why = CASES[case]
    try:
        given = NetworkConfig.model_validate(config(annotations))
        pod = pod_args(args)
    except (CniError, ValueError):  # refused, so not let go
        assert why is None
        return
    found = skip_unseen(
        pod.namespace, pod.name, given.pod_namespace, given.exclude_namespaces, given.runtime_config.annotations
    )
    assert (found is not None) == (why is not None)
    assert found is None or str(why) in found
    assert found is None or run("ADD", args, config(annotations)).stderr.endswith(f" is not captured: {found}\n")


@pytest.mark.parametrize(
    "broken",
    [{"exclude_namespaces": "kube-system"}, {"exclude_namespaces": [1, None]}, {"runtimeConfig": 7}],
)
def test_options_of_another_shape_let_nobody_go(broken: dict[str, Any]) -> None:
    done = run("ADD", POD.replace("default", "kube-syste"), {**config(MESH), **broken})
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)


def test_arguments_that_are_no_text_let_nobody_go() -> None:
    done = run("ADD", "K8S_POD_NAME=\udcff", config(NOT_KNOWN))
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 4)


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[socket.socket]:
    """An agent that takes connections, as far as the kernel goes, and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("case", [case for case, (_, _, why) in CASES.items() if why])
def test_what_starts_without_an_agent_tells_it_why_and_waits_for_no_answer(
    hung: socket.socket, tmp_path: Path, case: str
) -> None:
    args, annotations, why = CASES[case]
    done = run("ADD", args, config(annotations, tmp_path) | {"agent_timeout_seconds": 600})
    assert (done.returncode, json.loads(done.stdout)) == (0, PREVIOUS)
    with hung.accept()[0] as connection:
        text, descriptors = receive_message(connection)
        assert connection.recv(1) == b""
    told = decode(text)
    assert isinstance(told, Passed) and not descriptors
    assert str(why) in told.reason
    assert (told.container_id, told.namespace, told.name) == ("c1", pod_args(args).namespace, pod_args(args).name)
    assert told.uid == pod_args(args).uid


@pytest.mark.parametrize("case", [case for case, (_, _, why) in CASES.items() if why])
def test_check_of_what_starts_without_an_agent_does_not_ask_it(hung: socket.socket, tmp_path: Path, case: str) -> None:
    args, annotations, _ = CASES[case]
    assert run("CHECK", args, config(annotations, tmp_path)).returncode == 0
    with pytest.raises(BlockingIOError):
        hung.accept()


def test_an_agent_that_takes_nothing_more_delays_nobody_who_is_let_pass(tmp_path: Path) -> None:
    with ExitStack() as waiting, waiting.enter_context(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen(0)
        with pytest.raises(BlockingIOError):  # once the backlog is full
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(tmp_path / "cni.sock"))
        started = time.monotonic()
        done = run("ADD", POD, config(PLAIN, tmp_path) | {"agent_timeout_seconds": 600})
        assert (done.returncode, json.loads(done.stdout)) == (0, PREVIOUS)
        assert time.monotonic() - started < 2


def test_a_directory_that_no_socket_can_be_in_keeps_nobody_who_is_let_pass(tmp_path: Path) -> None:
    done = run("ADD", POD, config(PLAIN, tmp_path / ("x" * 200)))
    assert (done.returncode, json.loads(done.stdout)) == (0, PREVIOUS)


def test_check_of_a_pod_that_is_none_of_ours_says_nothing() -> None:
    done = run("CHECK", POD, config(PLAIN))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_leaving_succeeds_and_status_says_unavailable(command: str) -> None:
    done = run(command, POD, config(MESH))
    assert (done.returncode, done.stdout) == (0, "")
    done = run("STATUS", POD, config(MESH))
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 50)


def test_a_first_plugin_without_previous_result_gets_an_empty_one() -> None:
    stdin = config(PLAIN)
    del stdin["prevResult"]
    done = run("ADD", POD, stdin)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"cniVersion": "1.1.0"})


@pytest.fixture
def rival(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """istio-cni's agent, which takes connections; what tells the plugin where."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "log.sock"))
        listener.listen()
        yield {"istio_cni_run_dir": str(tmp_path), "agent_timeout_seconds": 600}


@pytest.mark.claim("istio-cni's agent serves on the node and sidestep's is not there")
def test_an_entry_that_was_left_behind_leaves_pods_to_istio_cni_while_its_agent_serves(rival: dict[str, Any]) -> None:
    started = time.monotonic()
    done = run("ADD", POD, config(MESH) | rival)
    assert (done.returncode, json.loads(done.stdout)) == (0, PREVIOUS)
    assert "left to istio-cni; to take the plugin out of the chain: sidestep uninstall --keep-capture" in done.stderr
    for command in ("CHECK", "STATUS", "DEL", "GC"):
        done = run(command, POD, config(MESH) | rival)
        assert (done.returncode, done.stdout) == (0, "")
    assert time.monotonic() - started < 5


def test_an_agent_that_is_there_is_asked_whoever_else_serves(
    rival: dict[str, Any], hung: socket.socket, tmp_path: Path
) -> None:
    done = run("ADD", POD, config(MESH, tmp_path) | rival | {"agent_timeout_seconds": 0.2})
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)
    hung.accept()[0].close()


def test_a_socket_that_nobody_serves_any_more_is_no_agent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "log.sock"))
    done = run("ADD", POD, config(MESH) | {"istio_cni_run_dir": str(tmp_path)})
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)


@pytest.mark.parametrize("broken", [7, None, "", "x" * 300, "/nowhere"])
def test_a_run_directory_of_istio_cnis_that_is_none_lets_nobody_go(broken: object) -> None:
    done = run("ADD", POD, config(MESH) | {"istio_cni_run_dir": broken})
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 11)


@pytest.mark.parametrize("case", CASES)
def test_on_a_node_with_ambient_mode_annotations_let_nobody_go_as_labels_decide(case: str) -> None:
    args, annotations, why = CASES[case]
    done = run("ADD", args, config(annotations) | {"ambient_enabled": True})
    is_told_by_annotations = why is not None and "annotation" in why
    assert (done.returncode == 0) is (why is not None and not is_told_by_annotations)
