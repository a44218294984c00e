"""Is this Pod in ambient mode? Istio's enablement selectors, and the Pods that are left out whatever their labels are.

The reference is Istio's node agent (cni/pkg/util, enablement selectors). Pure: namespaces' labels come from the caller.
"""

from collections.abc import Collection
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from bpf.errors import SidestepError
from cni.policy.membership import STATUS
from cni.policy.pod import Pod
from cni.policy.selectors import Labels, LabelSelector, Strict

# name of the environment variable in Istio's DaemonSet
SETTING = "AMBIENT_ENABLEMENT_SELECTOR"
MODE = "istio.io/dataplane-mode"
_ZTUNNEL = ("app", "ztunnel")  # the label of ztunnel's own pods
_TERMINAL = ("Succeeded", "Failed")

_LONGEST_QUOTE = 80
# what pydantic's kinds of errors are in words
_ADVICE = {
    "extra_forbidden": "there is no such field",
    "missing": "it is missing",
    "string_type": "it is not a text; put it in quotes",
    "dict_type": "it is not a mapping",
    "model_type": "it is not a mapping",
    "tuple_type": "it is not a list",
    "invalid_key": "the name of a field must be a text",
    "literal_error": "it is not an operator; give In, NotIn, Exists or DoesNotExist",
}

# what Istio's chart gives, in the same form
DEFAULT = f"""\
- podSelector: {{matchLabels: {{{MODE}: ambient}}}}
- podSelector: {{matchExpressions: [{{key: {MODE}, operator: NotIn, values: [none]}}]}}
  namespaceSelector: {{matchLabels: {{{MODE}: ambient}}}}
"""


class InvalidSelectors(SidestepError):
    """The enablement selectors are not what Kubernetes takes for label selectors."""


class Selector(Strict):
    """One entry of the list: it chooses a Pod if both halves match."""

    pod_selector: LabelSelector = LabelSelector()
    namespace_selector: LabelSelector = LabelSelector()

    def matches(self, pod: Labels, namespace: Labels) -> bool:
        """Whether it chooses a Pod with these labels in a namespace with those."""
        return self.pod_selector.matches(pod) and self.namespace_selector.matches(namespace)


_LIST = TypeAdapter(tuple[Selector, ...])


class Enablement:
    """The selectors of a node. A Pod is in ambient mode if one of them chooses it, and nothing keeps it out."""

    def __init__(
        self,
        text: str = DEFAULT,
        system_namespace: str = "istio-system",
        excluded: Collection[str] = (),
    ) -> None:
        """Parse a YAML list of {podSelector, namespaceSelector}. Raises InvalidSelectors.

        `system_namespace` is where ztunnel runs; pods of `excluded` namespaces are left alone.
        """
        self._selectors = _parsed(text)
        self._system_namespace, self._excluded = system_namespace, frozenset(excluded)

    def why_not(self, pod: Pod, namespace: Labels) -> str | None:
        """Why a Pod is not in ambient mode, as a sentence; None if it is. `namespace` are its namespace's labels."""
        if pod.spec.host_network:
            return "it uses the node's own network (hostNetwork)"
        if STATUS in pod.annotations:
            return f"it has a sidecar (annotation {STATUS})"
        if pod.namespace in self._excluded:
            return f"namespace {pod.namespace} is in exclude_namespaces"
        label, value = _ZTUNNEL
        if pod.namespace == self._system_namespace and pod.labels.get(label) == value:
            return "it is ztunnel itself"
        if pod.status.phase in _TERMINAL:
            return f"it has ended ({pod.status.phase})"
        if not any(each.matches(pod.labels, namespace) for each in self._selectors):
            return "no enablement selector chooses it"
        return None

    def flips(self, before: Labels, after: Labels) -> bool:
        """Whether a namespace whose labels change may get pods into ambient mode or out of it."""
        return any(
            each.namespace_selector.matches(before) != each.namespace_selector.matches(after)
            for each in self._selectors
        )


def _parsed(text: str) -> tuple[Selector, ...]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidSelectors(f"{SETTING} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, list):
        raise InvalidSelectors(
            f"{SETTING} is {_kind_of(found)}, not a list; give a YAML list of entries with podSelector, "
            "namespaceSelector or both"
        )
    try:
        return _LIST.validate_python(tuple(_without_nulls(found)))
    except ValidationError as error:
        raise InvalidSelectors(_sentence(error)) from error


def _without_nulls(value: Any) -> Any:
    """The same without what is null, which counts as not being there, as everywhere in Kubernetes."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _kind_of(found: Any) -> str:
    return {"NoneType": "empty", "dict": "a mapping", "str": "a text"}.get(type(found).__name__, type(found).__name__)


def _sentence(error: ValidationError) -> str:
    """The first problem in one line: the place, what is there, and what would be right."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"] if each != "[key]")
    advice = _ADVICE.get(first["type"], first["msg"].removeprefix("Value error, "))
    shown = repr(first["input"])
    if len(shown) > _LONGEST_QUOTE:
        shown = shown[:_LONGEST_QUOTE] + "…"
    return f"{SETTING}: {place.lstrip('.')}: {'' if first['type'] == 'missing' else f'{shown}: '}{advice}"
