"""Other programs on socket maps of this machine: acceleration is theirs then, and their names are told."""

import errno
import secrets

import pytest

from bpf import syscalls
from bpf.acceleration import other_owners
from bpf.attachment import attach_programs
from bpf.hooks import MESSAGE_HOOK
from bpf.syscalls import Descriptor
from tests.datapath.wires import Wire, scratch_pins
from tests.lab.machine import other_owner_for_all
from tests.lab.objects import create_sockhash, load_program

# tests of another checkout may own sockets of this machine too
THEIRS = f"their_{secrets.token_hex(3)}"
VERDICT = MESSAGE_HOOK.program_type, MESSAGE_HOOK.attach_type


def owners(wire: Wire) -> list[str]:
    return [owner for owner in other_owners(wire.kernel.pins) if THEIRS in owner]


@pytest.mark.parametrize("name", [THEIRS, "ss_message"], ids=["another-name", "our-name"])
def test_another_owner_of_socket_maps_is_named(wire: Wire, name: str) -> None:
    with (
        other_owner_for_all(),
        Descriptor(create_sockhash(4, 4, 16, THEIRS)) as sockets,
        Descriptor(load_program(*VERDICT, name)) as program,
    ):
        assert not owners(wire)
        syscalls.attach_to_map(program.fd, sockets.fd, 7, THEIRS)
        (found,) = owners(wire)
    assert found.startswith(f"{name} on map {THEIRS} (id ")


def test_another_program_on_our_own_map_is_named(wire: Wire) -> None:
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        assert not [owner for owner in other_owners(pins) if THEIRS in owner]
        with (
            Descriptor(pins.open_map("accelerated")) as sockets,
            Descriptor(load_program(*VERDICT, THEIRS)) as program,
        ):
            syscalls.attach_to_map(program.fd, sockets.fd, 7, "accelerated")
            (found,) = [owner for owner in other_owners(pins) if THEIRS in owner]
    assert found.startswith(f"{THEIRS} on map accelerated (id ")


def test_where_the_kernel_does_not_tell_programs_any_other_socket_map_counts(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, attach_type: int) -> syscalls.Attached:
        raise syscalls.refused("bpf_prog_query", f"attach type {attach_type}", errno.EINVAL)  # before 5.18

    monkeypatch.setattr(syscalls, "attached_to", refuse)
    assert not owners(wire)
    with Descriptor(create_sockhash(4, 4, 16, THEIRS)):
        (found,) = owners(wire)
    assert found.startswith(f"map {THEIRS} (id ")
    assert not [owner for owner in other_owners(wire.kernel.pins) if "accelerated" in owner]
