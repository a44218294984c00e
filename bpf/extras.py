"""Extras: features of the kernel that sidestep uses where they are there, and does without where they are not.

The compiler's child tries each extra by loading a program, never by the kernel's version, and compiles the programs
with the macros of those that the kernel takes. What the kernel lacks is recorded beside the digest of the sources
(attachment.py), for `sidestep status`; `sidestep probe` tries again. A kernel does not change under its pins, so only
the extras that the environment leaves out belong to what identifies the programs (compiler.sources_digest).
"""

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bpf import syscalls
from bpf.errors import KernelRefused, SidestepError
from bpf.hooks import CGROUP_SOCK_ADDR, ITERATOR_HOOK, MESSAGE_HOOK, SK_LOOKUP, Hook
from bpf.offsets import LISTENERS, SOCKETS, Field, NoOffsets, definitions
from bpf.syscalls import Descriptor

# names of extras, separated by commas, that are treated as if this kernel lacked them: for tests on any kernel
VARIABLE = "SIDESTEP_LACKING"
_CONNECT4, _LOOKUP = 10, 36  # BPF_CGROUP_INET4_CONNECT, BPF_SK_LOOKUP (uapi/linux/bpf.h)
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: opcode, both registers, offset, immediate


class UnknownExtra(SidestepError):
    """The environment leaves out an extra that does not exist."""


@dataclass(frozen=True)
class Trial:
    """The smallest program that uses a feature; `code` are its instructions."""

    program_type: int
    attach_type: int
    code: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Extra:
    """A feature of the kernel that is not needed for capture."""

    name: str
    needed_by: str
    without: str  # what is done without it, or lost
    since: str  # the first Linux that has it: for guidance only
    trial: Trial | None = None
    fields: tuple[Field, ...] = ()  # of the kernel's structs, whose offsets programs need for it
    hook: Hook | None = None  # a program that is there for this extra alone

    def macros(self) -> str:
        """What compiles the extra in. Raises NoOffsets."""
        return f"#define {self.name.upper()}\n{definitions(self.fields) if self.fields else ''}"

    def refusal(self) -> str:
        """Why this kernel lacks the extra, "" if it has it as far as can be told before its programs are loaded.

        If this process lacks a permission, these are the words for EPERM alone.
        """
        try:
            if self.fields:
                definitions(self.fields)
            if self.trial:
                code = b"".join(_INSTRUCTION.pack(*each) for each in self.trial.code)
                kind, attach_type = self.trial.program_type, self.trial.attach_type
                Descriptor(syscalls.load_program("ss_trial", kind, attach_type, code, [])).close()
        except NoOffsets as error:
            return str(error)
        except KernelRefused as error:
            words = os.strerror(error.errno)
            return words if error.errno == errno.EPERM else f"the kernel refuses it ({words})"
        return ""


_EXIT = (0x95, 0, 0, 0)
# sk_lookup's context tells the interface that a packet arrived on. r0 = *(u32 *)(context + 64); r0 = SK_PASS
INGRESS_IFINDEX = Extra(
    "ingress_ifindex",
    "excludeInterfaces, inbound",
    "a connection counts as arriving on the interface that has its destination address",
    "5.17",
    Trial(SK_LOOKUP, _LOOKUP, ((0x61, 0x10, 64, 0), (0xB7, 0, 0, 1), _EXIT)),
)
# bpf_set_retval (187): programs for connect() and sendmsg() say why they refuse. r1 = -EHOSTUNREACH; call; r0 = 0
SET_RETVAL = Extra(
    "set_retval",
    "errors of connect() and sendmsg()",
    "connections that have nowhere to go fail with EPERM instead of the kernel's errno",
    "6.1",
    Trial(CGROUP_SOCK_ADDR, _CONNECT4, ((0xB7, 1, 0, -113), (0x85, 0, 0, 187), (0xB7, 0, 0, 0), _EXIT)),
)
# bpf_get_current_pid_tgid (14) and bpf_get_current_comm (16), which writes 16 bytes to r1, below the frame's end
CALLER = Extra(
    "caller",
    "sidestep trace",
    "the events of a trace do not name the calling process",
    "6.1",
    Trial(
        CGROUP_SOCK_ADDR,
        _CONNECT4,
        (
            *((0x85, 0, 0, 14), (0xBF, 0xA1, 0, 0), (0x07, 1, 0, -16), (0xB7, 2, 0, 16)),
            *((0x85, 0, 0, 16), (0xB7, 0, 0, 1), _EXIT),
        ),
    ),
)
# iterator.c, and both ways of finding listeners: cni/enrolment/hearing.py
ITERATOR = Extra(
    "iterator",
    "listeners of running proxies",
    "they are copied from the pods' processes, which takes CAP_SYS_PTRACE and the node's procfs",
    "6.1.42, with BTF",
    fields=LISTENERS,
    hook=ITERATOR_HOOK,
)
# pairing.c, room.c, message.c; which level is safe says installer/acceleration
ACCELERATION = Extra(
    "acceleration",
    "speed within the node",
    "the level of acceleration is off",
    "6.1, with BTF",
    fields=SOCKETS,
    hook=MESSAGE_HOOK,
)
EXTRAS = (INGRESS_IFINDEX, SET_RETVAL, CALLER, ITERATOR, ACCELERATION)


def left_out() -> frozenset[str]:
    """The extras that the environment leaves out. Raises UnknownExtra."""
    asked = frozenset(filter(None, (each.strip() for each in os.environ.get(VARIABLE, "").split(","))))
    known = [each.name for each in EXTRAS]
    for name in sorted(asked.difference(known)):
        raise UnknownExtra(f'{VARIABLE}: "{name}" is not an extra; give some of {",".join(known)}, with commas')
    return asked


def lacking() -> dict[str, str]:
    """The extras that this kernel does not have, as far as can be told before all programs are loaded: name → why.

    Loads the kernel's type information into memory, so only child processes call it. Raises UnknownExtra.
    """
    forced = left_out()
    found = {each.name: f"left out by {VARIABLE}" if each.name in forced else each.refusal() for each in EXTRAS}
    return {name: why for name, why in found.items() if why}


def combinations(without: Mapping[str, str]) -> Iterator[tuple[Extra, ...]]:
    """The extras to compile in, best first: all that the kernel has, then fewer, should it refuse a program.

    Those with a trial have been loaded already. Others are known only by the kernel's type information.
    """
    there = [each for each in EXTRAS if each.name not in without]
    doubtful = [(), (ACCELERATION,), (ITERATOR,), (ACCELERATION, ITERATOR)]
    yield from dict.fromkeys(tuple(each for each in there if each not in dropped) for dropped in doubtful)
