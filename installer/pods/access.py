"""Access to the API server, from the pod's service account or from a kubeconfig."""

import os
from collections.abc import Callable
from pathlib import Path

import structlog
import urllib3
from kubernetes.client.configuration import Configuration

from installer.pods.api_errors import NoAccess
from installer.settings import Node

log = structlog.get_logger("api")

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def access_of(node: Node, account: Path = SERVICE_ACCOUNT) -> Callable[[], Configuration]:
    """A function that reads the configuration anew at each call, because credentials are renewed.

    Both this call and the function raise NoAccess if the settings don't lead to an API server.
    """

    def read() -> Configuration:
        configuration = _from_kubeconfig(node.kubeconfig) if node.kubeconfig else _from_account(account)
        if node.kube_ca_file:
            configuration.ssl_ca_cert = str(node.kube_ca_file)
        if node.skip_tls_verify:
            configuration.verify_ssl, configuration.ssl_ca_cert = False, None
        elif configuration.ssl_ca_cert and not Path(configuration.ssl_ca_cert).is_file():
            raise NoAccess(f"{configuration.ssl_ca_cert}: no such file; it should hold the API server's CA certificate")
        return configuration

    if node.skip_tls_verify:
        log.warning("api.unverified", consequence="anybody on the network path can impersonate the API server")
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # urllib3 would warn too, in another format
    if str(read().host).startswith("http:"):  # read now: wrong settings must fail at once
        log.warning("api.unencrypted", consequence="anybody on the network path can read the agent's token")
    return read


def _from_account(account: Path) -> Configuration:
    """The configuration inside a cluster. Kubelet renews the token's file, so it is read for every request."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise NoAccess("KUBERNETES_SERVICE_HOST and _PORT are not set: not in a cluster; give --kubeconfig FILE")
    protocol = os.environ.get("KUBERNETES_SERVICE_PROTOCOL") or "https"  # Istio's install-cni reads it too
    if protocol not in ("http", "https"):
        raise NoAccess(
            f'KUBERNETES_SERVICE_PROTOCOL: "{protocol}" is not a protocol of the API server; give http or https'
        )
    configuration = Configuration()
    configuration.host = f"{protocol}://{f'[{host}]' if ':' in host else host}:{port}"
    configuration.ssl_ca_cert = str(account / "ca.crt") if protocol == "https" else None

    def read_token(into: Configuration) -> None:
        try:
            into.api_key["BearerToken"] = f"Bearer {(account / 'token').read_text().strip()}"
        except OSError as error:
            raise NoAccess(f"{account / 'token'}: {error.strerror}; does the pod have a service account?") from error

    read_token(configuration)
    configuration.refresh_api_key_hook = read_token  # type: ignore[assignment]
    return configuration


def _from_kubeconfig(path: Path) -> Configuration:
    from kubernetes.config.kube_config import load_kube_config

    configuration = Configuration()
    try:
        load_kube_config(str(path), client_configuration=configuration)  # type: ignore[no-untyped-call]
    except Exception as error:  # also errors of YAML, base64 and credential plugins come through
        raise NoAccess(f"kubeconfig {path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return configuration
