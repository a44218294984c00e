"""Acts on broken pods, as Istio's repair controller does: pods that started before the plugin was in the chain.

A pod is broken if its istio-validation init container keeps failing with the code that means "no capture". The agent
enrols the running pod, deletes it, or labels it: the first of these three that is switched on. Unlike Istio's repair,
the agent also applies the plugin's rules on which pods belong to the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import structlog
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from bpf.errors import SidestepError
from cni.enrolment.adoption import Adoption
from cni.policy.membership import skip_reason
from cni.policy.pod import ContainerStatus, Pod, PodEvents
from installer.pods.api_errors import ApiFailed, Conflict
from installer.settings import Repair

log = structlog.get_logger("repair")

SUCCESS, SKIP, FAIL = "success", "skip", "fail"
# a Pod whose container keeps crashing may change while we act on it. Then we try as often as Istio does, but within
# about two seconds, because the watching thread waits meanwhile
_ATTEMPTS, _FIRST_PAUSE, _LONGEST_PAUSE = 5, 0.1, 0.8


class PodActions(Protocol):
    """Actions on a Pod through the API server. Each raises ApiFailed.

    delete_pod() and label_pod() return False if the Pod is gone, and raise Conflict if it has changed since read.
    """

    def get_pod(self, namespace: str, name: str) -> Pod | None:
        """The Pod of that name as it is now, None if there is none."""
        ...

    def selects_pod(self, pod: Pod, labels: str, fields: str) -> bool:
        """Whether label and field selectors, in kubectl's notation, choose this Pod."""
        ...

    def delete_pod(self, pod: Pod) -> bool:
        """Delete this Pod, and no other of its name."""
        ...

    def label_pod(self, pod: Pod, key: str, value: str) -> bool:
        """Put a label on the Pod."""
        ...


Ask = Callable[[PodActions, Pod], bool]


@dataclass
class Repairs:
    """Acts on each broken pod once, when the watch reports it."""

    settings: Repair
    actions: PodActions | None  # None on a node without API server: it can only enrol
    adoption: Adoption
    is_enrolled: Callable[[Pod], bool]
    events: PodEvents
    observe: Callable[[str, str], None]  # gets type and result: istio_cni_repair_pods_repaired_total
    skips: Callable[[Pod], str | None] = skip_reason  # why a Pod is none of the mesh; the agent's knows the node too
    # whether istio-cni's agent repairs pods here: two that repair one pod would capture it twice
    gives_way: Callable[[], bool] = lambda: False
    _done: set[str] = field(default_factory=set)  # UIDs
    _refused: dict[str, str] = field(default_factory=dict)  # UID → why, reported once
    _forbidden: dict[str, str] = field(default_factory=dict)  # UID → what the API server forbids to do about the pod

    def __post_init__(self) -> None:
        """Raises SidestepError if the settings have selectors but there is no API server to apply them."""
        settings = self.settings
        self._selectors = settings.repair_label_selectors, settings.repair_field_selectors
        if any(self._selectors) and self.actions is None:
            raise SidestepError(
                "--repair-label-selectors and --repair-field-selectors need an API server; leave them out"
            )

    def changed(self, before: Pod | None, after: Pod | None) -> None:
        """Handle a Pod that is new, has changed, or is gone (`after` is None)."""
        if after is None:
            uid = (before.uid if before else None) or ""
            self._done.discard(uid)
            self._refused.pop(uid, None)
            self._forbidden.pop(uid, None)
        elif not self.has_failed(after):
            self._forbidden.pop(after.uid or "", None)
        elif self._is_due(after) and not self.gives_way():
            self._act(after)

    def _is_due(self, pod: Pod) -> bool:
        return self.settings.repair_enabled and pod.uid not in self._done and self.is_broken(pod)

    def is_broken(self, pod: Pod) -> bool:
        """Whether the pod's validation failed because it is not captured, and the settings let us act on it."""
        settings = self.settings
        if settings.repair_sidecar_annotation and settings.repair_sidecar_annotation not in pod.annotations:
            return False
        if not self.has_failed(pod) or self.skips(pod) is not None:
            return False
        return self._is_selected(pod) is True

    def why_forbidden(self) -> str:
        """What the API server forbids to do about a broken pod, which so stays broken; "" if there is none."""
        return next(iter(dict(self._forbidden).values()), "")

    def has_failed(self, pod: Pod) -> bool:
        """Whether the pod's validation has failed because the pod was not captured, whatever the settings say to do."""
        return any(self._has_failed(pod, status) for status in self._validations(pod))

    def claims(self, pod: Pod) -> bool:
        """Whether the Pod must not be enrolled while it runs, because Repairs may delete or label it.

        True for a Pod whose validation has not passed yet, if the settings say to delete or label such a Pod, or if it
        is for istio-cni's agent to repair it.
        """
        if self.gives_way():
            return any(not _has_passed(status) for status in self._validations(pod))
        settings = self.settings
        if not settings.repair_enabled or settings.repair_repair_pods:
            return False
        if not settings.repair_delete_pods and not settings.repair_label_pods:
            return False
        return any(not _has_passed(status) for status in self._validations(pod)) and self._is_selected(pod) is not False

    def _is_selected(self, pod: Pod) -> bool | None:
        """Ask the API server whether the settings' selectors choose the pod; None if it does not answer."""
        if self.actions is None or not any(self._selectors):
            return True
        try:
            return self.actions.selects_pod(pod, *self._selectors)
        except ApiFailed as error:
            log.error("repair.failed", pod=f"{pod.namespace}/{pod.name}", error=str(error))
            return None

    def _validations(self, pod: Pod) -> list[ContainerStatus]:
        name = self.settings.repair_init_container_name
        return [each for each in pod.status.init_container_statuses if name in ("", each.name)]

    def _has_failed(self, pod: Pod, status: ContainerStatus) -> bool:
        if _has_passed(status):
            return False
        before = status.last_state.terminated
        if before is None and pod.spec.restart_policy == "Never":  # it is not tried again: this end is the last
            before = status.state.terminated
        wanted_code = self.settings.repair_init_container_exit_code
        wanted_message = self.settings.repair_init_container_termination_message
        if before is None or wanted_code not in (0, before.exit_code):
            return False
        return not wanted_message or before.message.strip() == wanted_message.strip()

    def _act(self, pod: Pod) -> None:
        settings = self.settings
        if settings.repair_repair_pods:
            kind, result = "repair", self._repair(pod)
        elif settings.repair_delete_pods:
            kind, result = "delete", self._delete(pod)
        elif settings.repair_label_pods:
            kind, result = "label", self._label(pod)
        else:
            return
        if result != FAIL:  # after a failure, the pod's next change causes the next attempt
            self._done.add(pod.uid or "")
            self._forbidden.pop(pod.uid or "", None)
        self.observe(kind, result)
        if result == SUCCESS:
            log.info("pod.repaired", pod=f"{pod.namespace}/{pod.name}", type=kind)
        elif result == SKIP:
            log.info("repair.needless", pod=f"{pod.namespace}/{pod.name}", type=kind)

    def _repair(self, pod: Pod) -> str:
        if self.is_enrolled(pod):  # its validation will pass when it runs again
            return SKIP
        for outcome in self.adoption.adopt([pod]):
            if outcome.left_alone:
                return SKIP
            if not outcome.problem:
                self.events.normal(pod, "CaptureRepaired", "enrolled while running: its validation passes on retry")
                return SUCCESS
            self._refuse(pod, outcome.problem, str(outcome.error or outcome.problem))
            return FAIL
        log.warning("repair.failed", pod=f"{pod.namespace}/{pod.name}", error="its processes are not found")
        return FAIL

    def _refuse(self, pod: Pod, problem: str, error: str) -> None:
        """Tell the owner once for each problem: the container restarts again and again. The log gets the `error`."""
        if self._refused.get(pod.uid or "") != problem:
            self._refused[pod.uid or ""] = problem
            log.error("repair.failed", pod=f"{pod.namespace}/{pod.name}", error=error)
            self.events.warning(pod, "CaptureRefused", problem)

    def _delete(self, pod: Pod) -> str:
        if self.is_enrolled(pod):  # its validation will pass; a new pod would do no better
            return SKIP
        return self._asked(
            lambda actions, now: actions.delete_pod(now),
            pod,
            "DeleteBrokenPod",
            "deleted: it started without traffic capture",
        )

    def _label(self, pod: Pod) -> str:
        key, value = self.settings.repair_broken_pod_label_key, self.settings.repair_broken_pod_label_value
        if key in pod.labels or self.is_enrolled(pod):
            return SKIP
        return self._asked(
            lambda actions, now: actions.label_pod(now, key, value),
            pod,
            "LabelBrokenPod",
            f"labelled {key}={value}: it started without traffic capture",
        )

    def _asked(self, ask: Ask, pod: Pod, reason: str, message: str) -> str:
        if self.actions is None:
            return FAIL
        try:
            done = self._ask(self.actions, ask, pod)
        except ApiFailed as error:
            log.error("repair.failed", pod=f"{pod.namespace}/{pod.name}", error=str(error))
            if error.status == HTTPStatus.FORBIDDEN:
                self._forbidden[pod.uid or ""] = f"{pod.namespace}/{pod.name} stays broken: {error}"
            return FAIL
        if done:
            self.events.warning(pod, reason, message)
        return SUCCESS if done else SKIP

    def _ask(self, actions: PodActions, ask: Ask, pod: Pod) -> bool:
        """Ask for an action, again if the pod changes meanwhile. False if nothing needs doing. Raises ApiFailed."""
        try:
            return ask(actions, pod)
        except Conflict:
            patiently = Retrying(
                stop=stop_after_attempt(_ATTEMPTS - 1),
                wait=wait_random_exponential(_FIRST_PAUSE, max=_LONGEST_PAUSE),
                retry=retry_if_exception_type(Conflict),
                reraise=True,
            )
            return patiently(self._ask_again, actions, ask, pod)

    def _ask_again(self, actions: PodActions, ask: Ask, pod: Pod) -> bool:
        """Read the Pod again, and ask for the action if it is the same Pod and still broken."""
        now = actions.get_pod(pod.namespace, pod.name)
        if now is None or now.uid != pod.uid or now.metadata.deletion_timestamp is not None:
            return False
        return self.is_broken(now) and not self.is_enrolled(now) and ask(actions, now)


def _has_passed(status: ContainerStatus) -> bool:
    now = status.state.terminated
    return now is not None and (now.reason == "Completed" or now.exit_code == 0)
