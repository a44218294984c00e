"""Other programs on socket maps of this machine: acceleration is theirs then, and their names are told."""

import errno

import pytest

from bpf import acceleration, syscalls
from bpf.acceleration import other_owners
from bpf.attachment import attach_programs
from bpf.compiler import MESSAGE_HOOK
from bpf.foreign import Attached
from bpf.pins import Descriptor
from tests.datapath.conftest import Wire, scratch_pins
from tests.lab.machine import other_owner_for_all
from tests.lab.objects import create_sockhash, load_program

VERDICT = MESSAGE_HOOK.program_type, MESSAGE_HOOK.attach_type


def owners(wire: Wire) -> list[str]:
    return [owner for owner in other_owners(wire.kernel.pins) if "their_" in owner]


@pytest.mark.parametrize("name", ["their_verdict", "ss_message"])
def test_another_owner_of_socket_maps_is_named(wire: Wire, name: str) -> None:
    with (
        other_owner_for_all(),
        Descriptor(create_sockhash(4, 4, 16, "their_sockets")) as sockets,
        Descriptor(load_program(*VERDICT, name)) as program,
    ):
        assert not owners(wire)
        syscalls.attach_to_map(program.fd, sockets.fd, 7, "their_sockets")
        (found,) = owners(wire)
    assert found.startswith(f"{name} on map their_sockets (id ")


def test_another_program_on_our_own_map_is_named(wire: Wire) -> None:
    with scratch_pins() as (pins, cgroup):
        attach_programs(pins, cgroup)
        assert not [owner for owner in other_owners(pins) if "their_" in owner]
        with (
            Descriptor(pins.open_map("accelerated")) as sockets,
            Descriptor(load_program(*VERDICT, "their_verdict")) as program,
        ):
            syscalls.attach_to_map(program.fd, sockets.fd, 7, "accelerated")
            (found,) = [owner for owner in other_owners(pins) if "their_" in owner]
    assert found.startswith("their_verdict on map accelerated (id ")


def test_where_the_kernel_does_not_tell_programs_any_other_socket_map_counts(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, attach_type: int) -> Attached:
        raise syscalls.refused("bpf_prog_query", f"attach type {attach_type}", errno.EINVAL)  # before 5.18

    monkeypatch.setattr(acceleration, "attached_to", refuse)
    assert not owners(wire)
    with Descriptor(create_sockhash(4, 4, 16, "their_sockets")):
        (found,) = owners(wire)
    assert found.startswith("whoever made map their_sockets (id ")
    assert not [owner for owner in other_owners(wire.kernel.pins) if "accelerated" in owner]
