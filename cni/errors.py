"""Errors a CNI runtime gets to see: a message for the operator and the code the CNI spec gives it."""

from enum import IntEnum

from bpf.errors import SidestepError


class Code(IntEnum):
    """CNI result codes (SPEC.md, section "Error"); 100 and above belong to the plugin."""

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
    """A request that fails, with the code and the optional detail the runtime is told."""

    code: Code = Code.INTERNAL

    def __init__(self, message: str, details: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.details = details
        if code is not None:
            self.code = code


class InvalidAnnotation(CniError):
    """A Pod field or annotation has a value that Istio would not take, or that sidestep cannot honour."""

    code = Code.INVALID_ANNOTATION


class InvalidRequest(CniError):
    """The request itself is malformed: configuration, CNI_ARGS or a missing field."""

    code = Code.INVALID_CONFIG


class PodNotFound(CniError):
    """No Pod of that namespace and name is known yet; the runtime may try again."""

    code = Code.TRY_AGAIN_LATER


class SandboxInvalid(CniError):
    """The network namespace is missing, is none, or has no address to capture for."""

    code = Code.INVALID_SANDBOX


class RegistrationFailed(CniError):
    """The maps or the namespace's link could not be written; what had been written is undone."""

    code = Code.REGISTRATION_FAILED


class NotCaptured(CniError):
    """Entries are there, but the programs that read them are not attached; that is being put right."""

    code = Code.TRY_AGAIN_LATER


class CheckFailed(CniError):
    """CHECK found the registration different from what the Pod asks for."""

    code = Code.CHECK_FAILED
