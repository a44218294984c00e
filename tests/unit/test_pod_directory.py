"""Pods from a directory of manifests that people edit while the agent runs."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cni.errors import Code, PodNotFound
from cni.policy.pod import Pod
from installer.pods.directory import PodDirectory
from tests.lab.waiting import wait_until


def manifest(name: str, namespace: str | None = None, uid: str | None = None, user: int = 1337) -> str:
    """JSON, which is YAML as well."""
    metadata = {"name": name, "namespace": namespace, "uid": uid, "annotations": None, "creationTimestamp": None}
    proxy = {"name": "istio-proxy", "securityContext": {"runAsUser": user}, "ports": [{"containerPort": 15090}]}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [proxy]}})


def put(path: Path, text: str) -> None:
    """Replace a file as an editor does, so that it is a new one however quickly that happens."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.rename(path)


def refusal(directory: PodDirectory, name: str, uid: str | None = None) -> str:
    with pytest.raises(PodNotFound) as caught:
        directory.find("default", name, uid)
    assert caught.value.code == Code.TRY_AGAIN_LATER
    return str(caught.value)


@pytest.fixture
def directory(tmp_path: Path) -> PodDirectory:
    return PodDirectory(tmp_path)


@pytest.mark.parametrize("file", ["a.yaml", "a.yml", "a.json"])
def test_a_pod_is_found_in_each_kind_of_file(directory: PodDirectory, file: str) -> None:
    (directory.path / file).write_text(manifest("app", "shop", "u1"))
    pod = directory.find("shop", "app", "u1")
    assert (pod.name, pod.namespace, pod.uid, pod.annotations) == ("app", "shop", "u1", {})
    assert pod.proxy is not None
    assert pod.proxy.security_context.run_as_user == 1337


def test_a_manifest_as_people_write_it_is_read(directory: PodDirectory) -> None:
    (directory.path / "app.yaml").write_text(
        """
        # what kubectl get pod -o yaml prints, shortened
        apiVersion: v1
        kind: Pod
        metadata:
          name: app
          creationTimestamp: 2024-05-01T10:00:00Z
          annotations:
            traffic.sidecar.istio.io/excludeOutboundPorts: "443"
          labels: {app: web}
        spec:
          initContainers:
          - name: istio-proxy
            args: [proxy, sidecar]
            env:
            - name: ISTIO_DUAL_STACK
              value: "true"
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
          containers:
          - name: web
        """
    )
    pod = directory.find("default", "app", "any")
    assert pod.annotations == {"traffic.sidecar.istio.io/excludeOutboundPorts": "443"}
    assert pod.labels == {"app": "web"}
    assert [container.name for container in pod.containers] == ["istio-proxy", "web"]
    assert pod.proxy is not None
    assert pod.proxy.args == ("proxy", "sidecar")
    assert pod.proxy.env_value("ISTIO_DUAL_STACK") == "true"
    assert pod.proxy.env_value("POD_NAME") is None


def test_every_pod_of_a_list_and_of_several_documents_is_found(directory: PodDirectory) -> None:
    listed = f'{{"kind": "List", "items": [{manifest("a")}, {{"kind": "Service"}}, {manifest("b")}]}}'
    documents = [listed, '{"kind": "ConfigMap"}', "", manifest("c")]
    (directory.path / "all.yaml").write_text("\n---\n".join(documents))
    assert [directory.find("default", name, None).name for name in "abc"] == ["a", "b", "c"]


def test_other_files_are_not_read(directory: PodDirectory) -> None:
    (directory.path / "app.txt").write_text(manifest("app"))
    (directory.path / "README.md").write_text("no: [yaml")
    assert "README" not in refusal(directory, "app")


def test_a_missing_pod_is_named_with_the_place_that_was_searched(directory: PodDirectory) -> None:
    assert refusal(directory, "app") == f"no Pod default/app in {directory.path}"


def test_a_pod_of_another_namespace_is_not_found(directory: PodDirectory) -> None:
    (directory.path / "a.yaml").write_text(manifest("app", "shop"))
    refusal(directory, "app")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none: No such file or directory" in refusal(PodDirectory(tmp_path / "none"), "app")


def test_a_pod_of_another_uid_is_not_found_and_both_are_named(directory: PodDirectory) -> None:
    (directory.path / "a.yaml").write_text(manifest("app", uid="old"))
    message = refusal(directory, "app", uid="new")
    assert "has UID new; the one there has old" in message


def test_a_uid_counts_only_when_both_sides_have_one(directory: PodDirectory) -> None:
    (directory.path / "a.yaml").write_text(manifest("app", uid="u1"))
    (directory.path / "b.yaml").write_text(manifest("other"))
    assert directory.find("default", "app", None).uid == "u1"
    assert directory.find("default", "other", "u2").uid is None


def test_of_two_pods_with_one_name_the_uid_chooses(directory: PodDirectory) -> None:
    (directory.path / "a.yaml").write_text(manifest("app", uid="old"))
    (directory.path / "b.yaml").write_text(manifest("app", uid="new"))
    assert directory.find("default", "app", "new").uid == "new"


def test_manifests_may_come_change_and_go(directory: PodDirectory) -> None:
    file = directory.path / "a.yaml"
    refusal(directory, "app")
    put(file, manifest("app", uid="u1"))
    assert directory.find("default", "app", None).uid == "u1"
    put(file, manifest("app", uid="u2"))
    assert directory.find("default", "app", None).uid == "u2"
    file.unlink()
    refusal(directory, "app")


def test_an_unchanged_manifest_is_not_read_again(directory: PodDirectory) -> None:
    (directory.path / "a.yaml").write_text(manifest("app"))
    (directory.path / "b.yaml").write_text(manifest("other"))
    before = directory.find("default", "app", None)
    put(directory.path / "b.yaml", manifest("another"))
    assert directory.find("default", "app", None) is before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("bad.yaml", "kind: [Pod"),
        ("bad.yaml", "just text"),
        ("bad.yaml", "kind: Pod\nmetadata: {}"),
        ("bad.yaml", "kind: Pod\nmetadata: {name: x, annotations: {port: 80}}"),
        ("bad.yaml", "kind: List\nitems: 7"),
        ("bad.yaml", 'a: !!int ""'),
        ("bad.yaml", "a: 2024-13-45"),
        ("bad.yaml", "a: !!python/object:os.system {}"),
        ("bad.yaml", "\x00"),
        ("bad.json", "{"),
        ("bad.json", "[" * 100_000),
        ("bad.json", "[]"),
        ("bad.json", ""),
    ],
)
def test_a_bad_file_is_reported_and_hides_no_other(directory: PodDirectory, file: str, text: str) -> None:
    (directory.path / file).write_text(text)
    (directory.path / "good.yaml").write_text(manifest("app"))
    with capture_logs() as logs:
        assert directory.find("default", "app", None).name == "app"
        assert refusal(directory, "other").endswith(f"; not readable: {file}")
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("manifest.ignored", "warning")
    assert line["file"] == str(directory.path / file)
    assert line["problem"]
    assert "\n" not in line["problem"]


def test_bytes_that_are_no_text_are_a_bad_file(directory: PodDirectory) -> None:
    (directory.path / "bad.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "bad.yaml" in refusal(directory, "app")


def test_a_dangling_link_and_a_folder_are_bad_files(directory: PodDirectory) -> None:
    (directory.path / "link.yaml").symlink_to("nowhere")
    (directory.path / "folder.yaml").mkdir()
    assert refusal(directory, "app").endswith("; not readable: folder.yaml, link.yaml")


def test_a_linked_manifest_is_followed(directory: PodDirectory) -> None:
    hidden = directory.path / "..data"
    hidden.mkdir()
    (hidden / "a.yaml").write_text(manifest("app"))
    (directory.path / "a.yaml").symlink_to("..data/a.yaml")
    assert directory.find("default", "app", None).name == "app"


def test_a_bad_file_is_logged_once_a_change(directory: PodDirectory) -> None:
    bad = directory.path / "bad.yaml"
    put(bad, "kind: [")
    with capture_logs() as logs:
        for _ in range(3):
            refusal(directory, "app")
        assert len(logs) == 1
        put(bad, "kind: {")
        refusal(directory, "app")
        assert len(logs) == 2
        put(bad, manifest("app"))
        directory.find("default", "app", None)
        assert len(logs) == 2


def test_what_is_wrong_is_named_by_place_without_the_value(directory: PodDirectory) -> None:
    text = (
        "kind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: istio-proxy, env: [{name: KEY, value: 5551234}]}]}"
    )
    (directory.path / "bad.yaml").write_text(text)
    with capture_logs() as logs:
        refusal(directory, "x")
    assert "spec.containers.0.env.0.value" in logs[0]["problem"]
    assert "5551234" not in logs[0]["problem"]


def test_a_file_written_in_place_is_noticed(directory: PodDirectory) -> None:
    file = directory.path / "a.yaml"
    file.write_text(manifest("app", user=1))
    directory.find("default", "app", None)
    file.write_text(manifest("app", user=2))
    os.utime(file, ns=(1, 1))  # whatever the clock's grain
    proxy = directory.find("default", "app", None).proxy
    assert proxy is not None
    assert proxy.security_context.run_as_user == 2


def test_many_threads_find_their_pods_while_files_change(directory: PodDirectory) -> None:
    names = [f"app-{n}" for n in range(20)]
    for name in names:
        put(directory.path / f"{name}.yaml", manifest(name))

    def find(name: str) -> str:
        put(directory.path / f"{name}.yaml", manifest(name, uid="new"))
        return directory.find("default", name, "new").name

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(find, names * 5)) == names * 5


def test_one_listeners_fault_keeps_nobody_from_hearing(directory: PodDirectory) -> None:
    heard: list[str] = []

    def broken(before: Pod | None, after: Pod | None) -> None:
        raise RuntimeError("a listener's own fault")

    directory.subscribe(broken)
    directory.subscribe(lambda before, after: heard.append((after or before).name))  # type: ignore[union-attr]
    with directory.running():
        for number, name in enumerate(("a", "b")):
            put(directory.path / f"{name}.yaml", manifest(name))
            wait_until(lambda: len(heard) == number + 1, "the change to be told", 30)  # noqa: B023
    assert heard == ["a", "b"]


def test_files_that_never_end_and_those_nested_too_deeply_are_named_and_hide_no_other(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(64 << 20)
    put(tmp_path / "good.yaml", manifest("web"))
    with capture_logs() as logs:
        found = PodDirectory(tmp_path).every()
    assert [pod.name for pod in found or ()] == ["web"]
    problems = {Path(each["file"]).name: each["problem"] for each in logs}
    assert problems["fifo.yaml"] == problems["zero.yaml"] == "it is not a regular file"
    assert problems["large.json"] == "it has more than 32 MiB"
    assert "recursion" in problems["deep.json"] and "nesting" in problems["deep.yaml"]
