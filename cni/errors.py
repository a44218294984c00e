"""Errors that a CNI runtime gets to see: a message for the operator, and a CNI result code."""

from enum import IntEnum

from bpf.errors import SidestepError


class Code(IntEnum):
    """CNI result codes (SPEC.md, section "Error"). Codes from 100 on are the plugin's own."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    INVALID_ENVIRONMENT = 4
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    INVALID_ANNOTATION = 100
    INVALID_SANDBOX = 101
    REGISTRATION_FAILED = 102
    CHECK_FAILED = 103
    INTERNAL = 999


class CniError(SidestepError):
    """A failed request, with the code and the optional details that the runtime is told."""

    code: Code = Code.INTERNAL

    def __init__(self, message: str, details: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.details = details
        if code is not None:
            self.code = code


class InvalidAnnotation(CniError):
    """A Pod field or annotation has a value that Istio would refuse, or that sidestep cannot honour."""

    code = Code.INVALID_ANNOTATION

    def __init__(self, message: str, annotation: str = "") -> None:
        """`annotation` is the name of what has the value."""
        super().__init__(message)
        self.annotation = annotation


class InvalidRequest(CniError):
    """The request itself is malformed: configuration, CNI_ARGS or a missing field."""

    code = Code.INVALID_CONFIG


class PodNotFound(CniError):
    """No Pod of that namespace and name is known yet; the runtime may try again."""

    code = Code.TRY_AGAIN_LATER


class SandboxInvalid(CniError):
    """The network namespace is missing, is not a network namespace, has no address yet, or cannot be prepared."""

    code = Code.INVALID_SANDBOX


class CapturedByIstio(SandboxInvalid):
    """Istio's own netfilter rules are in the pod's namespace: nobody could say which of the two captures it."""


class RulesNotChanged(CniError):
    """Istio's netfilter rules in a pod's namespace could not be read, taken away or put back."""

    code = Code.REGISTRATION_FAILED


class NotExchanged(CniError):
    """A running pod was not taken over from Istio's rules, or not given back to them. It is captured as before."""

    code = Code.REGISTRATION_FAILED


class RegistrationFailed(CniError):
    """A map entry or the pod's sk_lookup link could not be written. Everything written so far has been undone."""

    code = Code.REGISTRATION_FAILED


# what the runtime is told if the programs are not attached
DETACHED = (
    "sidestep's programs are not attached to the pods' cgroup on this node; the agent is attaching them again, "
    "so try again"
)


class NotCaptured(CniError):
    """The programs are not attached where the pod's processes will be."""

    code = Code.TRY_AGAIN_LATER


class CheckFailed(CniError):
    """CHECK found entries that differ from what the Pod asks for."""

    code = Code.CHECK_FAILED
