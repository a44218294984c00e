"""Certificates as istiod issues them to proxies: the name is a SPIFFE identity, which trustme can't write."""

import datetime
import os
from enum import StrEnum
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

_TRUST_DOMAIN = "cluster.local"
_VALID = datetime.timedelta(days=1)


class KeyKind(StrEnum):
    """Of a proxy's certificate. Istio's agent makes RSA keys unless ECC_SIGNATURE_ALGORITHM is set."""

    RSA = "rsa"  # of 2048 bits, as Istio's agent has them
    ECDSA = "ecdsa"


class MeshAuthority:
    """Signs for the proxies of one mesh."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, _TRUST_DOMAIN)])
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        built = _begun(name, self._key.public_key()).issuer_name(name)
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self._certificate = built.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())

    def issue(self, directory: Path, namespace: str, account: str, uid: int, kind: KeyKind = KeyKind.ECDSA) -> None:
        """Write cert.pem, key.pem and ca.pem of a service account into `directory`, for the user `uid`."""
        key = _new_key(kind)
        identity = x509.UniformResourceIdentifier(f"spiffe://{_TRUST_DOMAIN}/ns/{namespace}/sa/{account}")
        built = _begun(x509.Name([]), key.public_key()).issuer_name(self._certificate.subject)
        signed = built.add_extension(x509.SubjectAlternativeName([identity]), critical=True).sign(
            self._key, hashes.SHA256()
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        files = {
            "cert.pem": signed.public_bytes(Encoding.PEM),
            "key.pem": private,
            "ca.pem": self._certificate.public_bytes(Encoding.PEM),
        }
        for name, content in files.items():
            path = directory / name
            path.write_bytes(content)
            os.chown(path, uid, uid)
            path.chmod(0o600)


@cache
def mesh_authority() -> MeshAuthority:
    """The one of all labs of this process."""
    return MeshAuthority()


def _new_key(kind: KeyKind) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    if kind is KeyKind.RSA:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1())


def _begun(subject: x509.Name, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID)
        .not_valid_after(now + _VALID)
    )
