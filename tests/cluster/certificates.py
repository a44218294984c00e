"""Who is who: the cluster's authority, its programs' certificates, and the kubeconfigs that name them."""

from dataclasses import dataclass
from pathlib import Path

import trustme
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.cluster.addresses import API_URL


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs for everybody in the cluster."""

    def __init__(self, directory: Path) -> None:
        """The files are put into `directory`, which is made."""
        directory.mkdir()
        self._directory, self._authority = directory, trustme.CA()
        self.certificate = directory / "ca.crt"
        self._authority.cert_pem.write_to_path(self.certificate)

    def issue(self, user: str, *identities: str, group: str = "sidestep.test") -> Pair:
        """For a program that is `user` of `group` to Kubernetes and serves as `identities`: names and addresses."""
        stem = user.replace(":", "-")
        # Go takes no certificate whose list of names is empty
        leaf = self._authority.issue_cert(*identities or (stem,), common_name=user, organization_name=group)
        pair = Pair(self._directory / f"{stem}.crt", self._directory / f"{stem}.key")
        leaf.cert_chain_pems[0].write_to_path(pair.certificate)
        leaf.private_key_pem.write_to_path(pair.key)
        return pair

    def kubeconfig(self, user: str, group: str = "sidestep.test") -> Path:
        """With a certificate of its own."""
        pair = self.issue(user, group=group)
        path = self._directory / f"{user.replace(':', '-')}.kubeconfig"
        path.write_text(yaml.safe_dump(_kubeconfig(self.certificate, pair)))
        path.chmod(0o600)
        return path

    def signing_key(self) -> Pair:
        """What signs service accounts' tokens; its `certificate` is the public key alone."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pair = Pair(self._directory / "tokens.pub", self._directory / "tokens.key")
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        pair.certificate.write_bytes(public)
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair


def _kubeconfig(authority: Path, pair: Pair) -> dict[str, object]:
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": API_URL, "certificate-authority": str(authority)}}],
        "users": [{"name": "me", "user": user}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "me"}}],
        "current-context": "it",
    }
