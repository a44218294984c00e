"""The parts of a Kubernetes Pod that capture depends on, and the protocols of Pod sources and Pod events.

Istio's plugin reads nothing else of a Pod: no pod-level securityContext, no valueFrom, no namespace labels.
"""

from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

PROXY_CONTAINER = "istio-proxy"

# what Go's strconv.ParseBool accepts
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))

# the range that Kubernetes allows (apimachinery, IsValidUserID)
UnixId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _KubernetesObject(BaseModel):
    """JSON as the API server writes it: camelCase, with more fields than we read, and null for "not set"."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        hide_input_in_errors=True,  # an env value may be a secret, and errors are logged
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class EnvVar(_KubernetesObject):
    """One environment variable; the value is None when it comes from elsewhere (valueFrom)."""

    name: str
    value: str | None = None


class SecurityContext(_KubernetesObject):
    """The user and group that a container's own securityContext sets."""

    run_as_user: UnixId | None = None
    run_as_group: UnixId | None = None


class Container(_KubernetesObject):
    """One container, init or regular."""

    name: str
    args: tuple[str, ...] = ()
    env: tuple[EnvVar, ...] = ()
    security_context: SecurityContext = SecurityContext()

    def env_value(self, name: str) -> str | None:
        """The literal value of a variable; None if there is none. If a name comes several times, the last counts."""
        return next((entry.value for entry in reversed(self.env) if entry.name == name), None)


class Metadata(_KubernetesObject):
    """The Pod's names, and the annotations and labels that its author and Istio's injector gave it."""

    name: str
    namespace: str = "default"
    uid: str | None = None
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    resource_version: str = ""
    deletion_timestamp: str | None = None  # set once somebody has deleted the Pod; it may live on for its grace period


class PodSpec(_KubernetesObject):
    """What the Pod runs."""

    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    host_network: bool = False
    node_name: str = ""
    service_account_name: str = ""
    restart_policy: str = "Always"


class Terminated(_KubernetesObject):
    """How a container's process ended."""

    exit_code: int = 0
    reason: str = ""
    message: str = ""


class ContainerState(_KubernetesObject):
    """The state of a container. Only its end is read."""

    terminated: Terminated | None = None


class ContainerStatus(_KubernetesObject):
    """The status of one container. The id is "<runtime>://<id>", or empty before the container has been created."""

    name: str
    container_id: str = Field(default="", alias="containerID")
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodStatus(_KubernetesObject):
    """The Pod as kubelet last saw it."""

    phase: str = ""
    pod_ip: str = Field(default="", alias="podIP")
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(_KubernetesObject):
    """A Pod as its manifest or the API server gives it."""

    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def name(self) -> str:
        """Name within the namespace."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """Namespace; `default` when the manifest leaves it out."""
        return self.metadata.namespace

    @property
    def uid(self) -> str | None:
        """UID that the API server gave the Pod; None in a manifest that was never in an API server."""
        return self.metadata.uid

    @property
    def annotations(self) -> dict[str, str]:
        """Annotations; empty when there are none."""
        return self.metadata.annotations

    @property
    def labels(self) -> dict[str, str]:
        """Labels; empty when there are none."""
        return self.metadata.labels

    @property
    def containers(self) -> tuple[Container, ...]:
        """All containers, init ones first: a native sidecar is an init container."""
        return self.spec.init_containers + self.spec.containers

    @property
    def proxy(self) -> Container | None:
        """The sidecar, None when the Pod has none."""
        return next((each for each in self.containers if each.name == PROXY_CONTAINER), None)

    @property
    def container_ids(self) -> tuple[str, ...]:
        """The ids of all its present containers, without the runtime's name in front."""
        statuses = self.status.init_container_statuses + self.status.container_statuses
        return tuple(each.container_id.rpartition("://")[2] for each in statuses if each.container_id)

    @property
    def is_running(self) -> bool:
        """Whether the Pod has an address and its containers have not ended for good."""
        return bool(self.status.pod_ip) and self.status.phase not in ("Succeeded", "Failed")

    @property
    def is_deleted(self) -> bool:
        """Whether somebody has deleted the Pod: its containers are ending, or will within the grace period."""
        return self.metadata.deletion_timestamp is not None

    @property
    def proxy_container_id(self) -> str | None:
        """The id of the sidecar's present container; None before there is one."""
        statuses = self.status.init_container_statuses + self.status.container_statuses
        ids = (each.container_id.rpartition("://")[2] for each in statuses if each.name == PROXY_CONTAINER)
        return next(filter(None, ids), None)


class PodSource(Protocol):
    """Where the CNI server gets Pods from: a directory of manifests, or the API server's watch."""

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        """The Pod of that name; its UID must match if both sides know one. Raises PodNotFound."""
        ...

    def every(self) -> list[Pod] | None:
        """All Pods of this node. None while they are not known: then a missing Pod does not count as gone."""
        ...


class PodEvents(Protocol):
    """Tells a Pod's owner what happens to the Pod, with Kubernetes Events. Never raises, never blocks."""

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Report something that the owner should change. `reason` is CamelCase."""
        ...

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Report something that was done. `reason` is CamelCase."""
        ...


class NoEvents:
    """PodEvents for a node without an API server: only the log reports."""

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Do nothing."""

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Do nothing."""


def parse_bool(text: str | None) -> bool | None:
    """A text as Go's strconv.ParseBool reads it; None if there is no text or ParseBool would refuse it."""
    if text in _TRUE:
        return True
    return False if text in _FALSE else None
