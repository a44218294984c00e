"""The parts of a Kubernetes Pod that decide about capture, and the door through which Pods arrive.

Istio's plugin reads nothing else of a Pod: no pod-level securityContext, no valueFrom, no namespace labels.
"""

from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

PROXY_CONTAINER = "istio-proxy"

# what strconv.ParseBool takes
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))

# the range that Kubernetes allows (apimachinery, IsValidUserID)
UnixId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _KubernetesObject(BaseModel):
    """JSON as the API server writes it: camelCase, more fields than we know, and null for "not set"."""

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
    """Who a container runs as, where its own securityContext says so."""

    run_as_user: UnixId | None = None
    run_as_group: UnixId | None = None


class Container(_KubernetesObject):
    """One container, init or regular."""

    name: str
    args: tuple[str, ...] = ()
    env: tuple[EnvVar, ...] = ()
    security_context: SecurityContext = SecurityContext()

    def env_value(self, name: str) -> str | None:
        """The literal value of a variable, None when there is none; of several entries the last counts."""
        return next((entry.value for entry in reversed(self.env) if entry.name == name), None)


class Metadata(_KubernetesObject):
    """Who the Pod is and what Istio's injector wrote on it."""

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


class Terminated(_KubernetesObject):
    """How a container's process ended."""

    exit_code: int = 0
    reason: str = ""
    message: str = ""


class ContainerState(_KubernetesObject):
    """What became of a container, as far as it matters here."""

    terminated: Terminated | None = None


class ContainerStatus(_KubernetesObject):
    """What runs as one container; the id is "<runtime>://<id>", empty before it has been created."""

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
        """UID the API server gave it; None in a manifest that has never been there."""
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
        """The ids of all its present containers, without the runtime's name before them."""
        statuses = self.status.init_container_statuses + self.status.container_statuses
        return tuple(each.container_id.rpartition("://")[2] for each in statuses if each.container_id)

    @property
    def is_running(self) -> bool:
        """Whether its sandbox is up and its containers have not ended for good."""
        return bool(self.status.pod_ip) and self.status.phase not in ("Succeeded", "Failed")

    @property
    def proxy_container_id(self) -> str | None:
        """The id of the sidecar's present container, None before there is one."""
        statuses = self.status.init_container_statuses + self.status.container_statuses
        ids = (each.container_id.rpartition("://")[2] for each in statuses if each.name == PROXY_CONTAINER)
        return next(filter(None, ids), None)


class PodSource(Protocol):
    """Where the CNI server gets Pods from: a directory of manifests, or the API server's watch."""

    def find(self, namespace: str, name: str, uid: str | None) -> Pod:
        """The Pod of that name, and of that UID where both sides know one. Raises PodNotFound."""
        ...

    def every(self) -> list[Pod] | None:
        """All Pods of this node; None while that is not known: then nothing may be concluded from an absence."""
        ...


class PodEvents(Protocol):
    """Where what happens to a Pod is told to its owner: Kubernetes Events. Never raises, never blocks."""

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Something the owner should change; `reason` is CamelCase."""
        ...

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Something that was done."""
        ...


class NoEvents:
    """PodEvents of a node without an API server: the log has to do."""

    def warning(self, pod: Pod, reason: str, message: str) -> None:
        """Nothing."""

    def normal(self, pod: Pod, reason: str, message: str) -> None:
        """Nothing."""


def parse_bool(text: str | None) -> bool | None:
    """What Go's strconv.ParseBool makes of a text; None when it would refuse it or there is none."""
    if text in _TRUE:
        return True
    return False if text in _FALSE else None
