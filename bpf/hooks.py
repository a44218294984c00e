"""The hooks that the programs are for: one program each, with the kernel's numbers for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """One program: its function, the pin's name, and the kernel's numbers for its type (uapi/linux/bpf.h)."""

    name: str
    program_type: int
    attach_type: int

    @property
    def function(self) -> str:
        """The C function's name, which bpftool shows; the kernel keeps 15 characters."""
        return f"ss_{self.name}"


class IteratorHook(Hook):
    """The iterator over TCP sockets: bcc knows by the function's name what to iterate over."""

    target = "tcp"  # what the kernel calls it

    @property
    def function(self) -> str:
        """The C function's name."""
        return f"bpf_iter__{self.target}"


CGROUP_SOCK, SOCK_OPS, SK_MSG, RAW_TRACEPOINT, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT, SK_LOOKUP = 9, 13, 16, 17, 18, 25, 30
TRACING = 26

CGROUP_HOOKS = (
    Hook("sock_create", CGROUP_SOCK, 2),
    Hook("connect4", CGROUP_SOCK_ADDR, 10),
    Hook("connect6", CGROUP_SOCK_ADDR, 11),
    Hook("post_bind4", CGROUP_SOCK, 12),
    Hook("post_bind6", CGROUP_SOCK, 13),
    Hook("sendmsg4", CGROUP_SOCK_ADDR, 14),
    Hook("sendmsg6", CGROUP_SOCK_ADDR, 15),
    Hook("recvmsg4", CGROUP_SOCK_ADDR, 19),
    Hook("recvmsg6", CGROUP_SOCK_ADDR, 20),
    Hook("getpeername4", CGROUP_SOCK_ADDR, 29),
    Hook("getpeername6", CGROUP_SOCK_ADDR, 30),
    Hook("sockops", SOCK_OPS, 3),
    Hook("getsockopt", CGROUP_SOCKOPT, 21),
)
# each pod's namespace has an instance of NETNS_HOOK; every instance calls the one program of LOOKUP_HOOK (lookup.c)
NETNS_HOOK = Hook("steer", SK_LOOKUP, 36)
LOOKUP_HOOK = Hook("sk_lookup", SK_LOOKUP, 36)
HOOKS = (*CGROUP_HOOKS, NETNS_HOOK, LOOKUP_HOOK)
# the programs that decide about outbound connections; the others complete what these have begun
DECIDING = ("connect4", "connect6", "sendmsg4", "sendmsg6")
# there only where the kernel allows acceleration (offsets.py); attached to the socket hash by acceleration.py
MESSAGE_HOOK = Hook("message", SK_MSG, 7)
# there only where the kernel takes it (iterator.py): over the TCP sockets of a namespace
ITERATOR_HOOK = IteratorHook("iterator", TRACING, 28)

# loaded by whoever traces: hook → its raw tracepoint
DEATH_HOOKS = {
    Hook("signal", RAW_TRACEPOINT, 0): "signal_generate",
    Hook("exit", RAW_TRACEPOINT, 0): "sched_process_exit",
}
