"""Kubernetes' label selectors: which labels they choose, and which selectors Kubernetes would refuse.

The rules are those of apimachinery's LabelSelectorAsSelector and of its validation of labels.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictStr, model_validator
from pydantic.alias_generators import to_camel

Labels = Mapping[str, str]

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LONGEST_DOMAIN = 253


def _key(text: str) -> str:
    domain, slash, name = text.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and not (_DOMAIN.fullmatch(domain) and len(domain) <= _LONGEST_DOMAIN)):
        raise ValueError("it is not the key of a label; give one such as istio.io/dataplane-mode")
    return text


def _value(text: str) -> str:
    if text and not _NAME.fullmatch(text):
        raise ValueError("it is not the value of a label; give up to 63 letters, digits, - _ . or nothing")
    return text


Key = Annotated[StrictStr, AfterValidator(_key)]
Value = Annotated[StrictStr, AfterValidator(_value)]


class Strict(BaseModel):
    """JSON in camelCase. A field that nobody knows is refused: a selector without its misspelt half would match all."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class Requirement(Strict):
    """What one label has to be."""

    key: Key
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _has_values_where_needed(self) -> "Requirement":
        needs = self.operator in ("In", "NotIn")
        if needs != bool(self.values):
            raise ValueError(f"{self.operator} {'needs' if needs else 'takes no'} values")
        return self

    def matches(self, labels: Labels) -> bool:
        """Whether labels are as required. As in Kubernetes, NotIn holds for labels without the key as well."""
        if self.operator == "Exists":
            return self.key in labels
        if self.operator == "DoesNotExist":
            return self.key not in labels
        return (labels.get(self.key) in self.values) == (self.operator == "In")


class LabelSelector(Strict):
    """All of it has to match. An empty selector matches everything."""

    match_labels: dict[Key, Value] = {}
    match_expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """Whether the selector chooses something with these labels."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            each.matches(labels) for each in self.match_expressions
        )
