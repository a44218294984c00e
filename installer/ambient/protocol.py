"""ZDS, the protocol by which a node agent hands pods over to ztunnel: messages, and the records that carry them.

ztunnel connects to a unix socket of the agent's, of the kind SOCK_SEQPACKET. A record is one protobuf message. The
messages are those of Istio's package istio.workload.zds; they are described here at run time, so that no code has to be
generated. This module is imported only where ambient mode is on: protobuf takes 5 MiB.
"""

from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from bpf.errors import SidestepError

# bytes that ztunnel and Istio's agent read of a record; a longer one would arrive cut off
LONGEST_RECORD = 1024

_PACKAGE = "istio.workload.zds"
_STRING, _ENUM, _MESSAGE = 9, 14, 11  # FieldDescriptorProto.Type
# Each message's fields: name, number, and the type: a text, or the message or enum of that name. The numbers are
# Istio's, gaps included. Fields of one of _CHOICES exclude each other.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ZdsHello": {"version": (1, "Version")},
    "WorkloadInfo": {"name": (1, ""), "namespace": (2, ""), "service_account": (3, "")},
    "AddWorkload": {"uid": (1, ""), "workload_info": (2, "WorkloadInfo")},
    "KeepWorkload": {"uid": (1, "")},
    "DelWorkload": {"uid": (2, "")},
    "SnapshotSent": {},
    "Ack": {"error": (1, "")},
    "WorkloadRequest": {
        "add": (1, "AddWorkload"),
        "del": (2, "DelWorkload"),
        "snapshot_sent": (3, "SnapshotSent"),
        "keep": (5, "KeepWorkload"),
    },
    "WorkloadResponse": {"ack": (1, "Ack")},
}
_ENUMS = {"Version": {"NOT_USED": 0, "V1": 1}}
_CHOICES = ("WorkloadRequest", "WorkloadResponse")


class ProtocolError(SidestepError):
    """A record that ZDS does not have, or has no room for."""


@dataclass(frozen=True)
class Workload:
    """A pod, as ztunnel gets to know it."""

    uid: str
    name: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def add(workload: Workload) -> bytes:
    """The record that hands a pod over. A descriptor of its network namespace goes with it. Raises ProtocolError."""
    added = _request("add")
    added.add.uid = workload.uid
    info = added.add.workload_info
    info.name, info.namespace, info.service_account = workload.name, workload.namespace, workload.service_account
    return _record(added)


def keep(uid: str) -> bytes:
    """The record of a snapshot for a pod whose namespace is not known now. Raises ProtocolError."""
    kept = _request("keep")
    kept.keep.uid = uid
    return _record(kept)


def delete(uid: str) -> bytes:
    """The record that takes a pod back. Raises ProtocolError."""
    deleted = _request("del")
    getattr(deleted, "del").uid = uid
    return _record(deleted)


def snapshot_sent() -> bytes:
    """The record that ends a snapshot."""
    return _record(_request("snapshot_sent"))


def hello_version(record: bytes) -> int:
    """The version that a ZdsHello has. Raises ProtocolError."""
    return int(_parsed("ZdsHello", record).version)


def refusal_in(record: bytes) -> str:
    """Why ztunnel has refused a request; "" if it has accepted it. Raises ProtocolError if the record is no answer."""
    response = _parsed("WorkloadResponse", record)
    if not response.HasField("ack"):
        raise ProtocolError("ztunnel's answer is neither an acknowledgement nor a refusal")
    return str(response.ack.error)


def _request(kind: str) -> Any:
    request = _CLASSES["WorkloadRequest"]()
    getattr(request, kind).SetInParent()
    return request


def _record(message: Any) -> bytes:
    record: bytes = message.SerializeToString()
    if len(record) > LONGEST_RECORD:
        raise ProtocolError(f"a record of {len(record)} bytes: ztunnel reads no more than {LONGEST_RECORD}")
    return record


def _parsed(name: str, record: bytes) -> Any:
    try:
        return _CLASSES[name].FromString(record)
    except DecodeError as error:
        raise ProtocolError(f"{record[:16].hex()}… is no {name}: {' '.join(str(error).split())}") from error


def _described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="zds.proto", package=_PACKAGE, syntax="proto3")
    for name, numbers in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in numbers.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if name in _CHOICES:
            message.oneof_decl.add(name="payload")
        for field, (number, of) in fields.items():
            kind = _ENUM if of in _ENUMS else _MESSAGE if of else _STRING
            added = message.field.add(name=field, number=number, type=kind, label=1)
            if of:
                added.type_name = f".{_PACKAGE}.{of}"
            if name in _CHOICES:
                added.oneof_index = 0
    return file


def _classes() -> dict[str, Any]:
    """The classes of the messages. Their pool is our own: another part of the process may have Istio's file."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_described())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()
