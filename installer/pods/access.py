"""How the API server is reached: the pod's service account, or a kubeconfig."""

import os
from collections.abc import Callable
from pathlib import Path

from kubernetes.client.configuration import Configuration

from installer.pods.errors import NoAccess
from installer.settings import Node

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def access_of(node: Node, account: Path = SERVICE_ACCOUNT) -> Callable[[], Configuration]:
    """A function that reads the configuration anew, as credentials are renewed. It raises NoAccess."""

    def read() -> Configuration:
        configuration = _from_kubeconfig(node.kubeconfig) if node.kubeconfig else _from_account(account)
        if node.kube_ca_file:
            configuration.ssl_ca_cert = str(node.kube_ca_file)
        if node.skip_tls_verify:
            configuration.verify_ssl = False
        return configuration

    read()  # what is wrong from the beginning is said at the beginning
    return read


def _from_account(account: Path) -> Configuration:
    """The cluster from inside. The token is a file that kubelet renews, and is read for every request."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise NoAccess("KUBERNETES_SERVICE_HOST and _PORT are not set: not in a cluster; give --kubeconfig FILE")
    configuration = Configuration()
    configuration.host = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    configuration.ssl_ca_cert = str(account / "ca.crt")

    def read_token(into: Configuration) -> None:
        try:
            into.api_key["BearerToken"] = f"Bearer {(account / 'token').read_text().strip()}"
        except OSError as error:
            raise NoAccess(f"{account / 'token'}: {error.strerror}; does the pod have a service account?") from error

    read_token(configuration)
    configuration.refresh_api_key_hook = read_token  # type: ignore[assignment]
    return configuration


def _from_kubeconfig(path: Path) -> Configuration:
    from kubernetes.config.config_exception import ConfigException
    from kubernetes.config.kube_config import load_kube_config

    configuration = Configuration()
    try:
        load_kube_config(str(path), client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError) as error:
        raise NoAccess(f"kubeconfig {path}: {error}") from error
    return configuration
