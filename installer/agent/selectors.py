"""Label and field selectors of the repair settings, as kubectl writes them, matched against Pods here.

The watch is for all Pods of the node, as capture needs them; which of them may be repaired is decided by these.
"""

import re
from dataclasses import dataclass

from bpf.errors import SidestepError
from cni.policy.pod import Pod

_TERM = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<no>[^\s!=,()]+)"
    r"|(?P<key>[^\s!=,()]+)\s*(?:(?P<equal>==?|!=)\s*(?P<value>[^\s!=,()]*)"
    r"|\s(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)\s*(?:,|$)"
)


@dataclass(frozen=True)
class _Term:
    """`key` must have one of `values` (any, when there are none), or must not."""

    key: str
    values: frozenset[str]
    wanted: bool

    def matches(self, having: dict[str, str]) -> bool:
        found = self.key in having and (not self.values or having[self.key] in self.values)
        return found is self.wanted


@dataclass(frozen=True)
class Selector:
    """Pods that satisfy both; empty ones are satisfied by all."""

    labels: tuple[_Term, ...]
    fields: tuple[_Term, ...]

    @classmethod
    def of(cls, labels: str, fields: str) -> "Selector":
        """Read the settings. Raises SidestepError naming what cannot be understood."""
        chosen = cls(_terms(labels, "--repair-label-selectors"), _terms(fields, "--repair-field-selectors"))
        known = _fields(Pod.model_validate({"metadata": {"name": ""}}))
        for term in chosen.fields:
            if term.key not in known or not term.values:
                raise SidestepError(
                    f'--repair-field-selectors: "{term.key}" cannot be selected by; give FIELD=VALUE or FIELD!=VALUE '
                    f"of {', '.join(known)}"
                )
        return chosen

    def matches(self, pod: Pod) -> bool:
        """Whether this Pod is one of them."""
        having = _fields(pod)
        return all(term.matches(pod.labels) for term in self.labels) and all(
            term.matches(having) for term in self.fields
        )


def _fields(pod: Pod) -> dict[str, str]:
    """The fields of a Pod that the API server selects by, as far as they are known here."""
    return {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "spec.nodeName": pod.spec.node_name,
        "status.phase": pod.status.phase,
        "status.podIP": pod.status.pod_ip,
    }


def _terms(text: str, setting: str) -> tuple[_Term, ...]:
    terms, position = [], 0
    while position < len(text.rstrip()):
        found = _TERM.match(text, position)
        if found is None:
            raise SidestepError(
                f'{setting}: "{text}" cannot be understood at "{text[position:].strip()}"; give KEY, !KEY, KEY=VALUE, '
                "KEY!=VALUE, KEY in (A, B), KEY notin (A, B), separated by commas"
            )
        terms.append(_term(found))
        position = found.end()
    return tuple(terms)


def _term(found: re.Match[str]) -> _Term:
    if found["absent"]:
        return _Term(found["no"], frozenset(), False)
    if found["set"]:
        values = frozenset(each.strip() for each in found["values"].split(","))
        return _Term(found["key"], values, found["set"] == "in")
    values = frozenset() if found["equal"] is None else frozenset([found["value"]])
    return _Term(found["key"], values, found["equal"] != "!=")
