"""What a bug report must not have, and that it says what it has."""

import io
import json
import tarfile
from typing import Any

import pytest

from installer.commands.bugreport.archive import archive
from installer.commands.bugreport.parts import Part
from installer.commands.bugreport.redaction import LEFT_OUT, without_secrets


def cleaned(document: Any) -> Any:
    return json.loads(without_secrets(json.dumps(document).encode()))


@pytest.mark.parametrize(
    "name", ["k8s_auth_token", "etcd_key", "Password", "certificate-authority-data", "clientSecret", "credentials"]
)
def test_a_value_that_may_be_a_secret_is_left_out_at_any_depth(name: str) -> None:
    found = cleaned({"plugins": [{"type": "calico", "policy": {name: "abc"}}]})
    assert found == {"plugins": [{"type": "calico", "policy": {name: LEFT_OUT}}]}


def test_the_rest_of_a_configuration_is_as_it_was() -> None:
    document = {"cniVersion": "1.0.0", "name": "k8s", "plugins": [{"type": "bridge", "mtu": 1450, "isGateway": True}]}
    assert cleaned(document) == document


def test_what_cant_be_read_is_left_out_as_a_whole() -> None:
    assert without_secrets(b"users:\n- token: abc\n") == f"{LEFT_OUT}: 20 bytes that are no JSON\n".encode()


def test_the_archive_says_what_each_file_is() -> None:
    made = archive(
        "node-1", [Part("status.txt", "the verdict", b"OK\n"), Part("cni/10-a.conflist", "the chain", b"{}")]
    )
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        names = tar.getnames()
        about = tar.extractfile("sidestep-bugreport-node-1/README.txt")
        assert about is not None
        text = about.read().decode()
    assert names == [f"sidestep-bugreport-node-1/{each}" for each in ("README.txt", "status.txt", "cni/10-a.conflist")]
    assert "status.txt         the verdict" in text
    assert "cni/10-a.conflist  the chain" in text
