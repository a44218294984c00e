"""What leaves a network namespace, packet by packet, whoever sends it: the truth that others' lists are held against.

Run as `python3 -I -S -c … INTERFACE`: says "ready", and at a line of input prints as JSON what it has seen since, a
list of [protocol number, source port, destination, destination port]. Ports are 0 without TCP or UDP; fragments and
IPv6 extension headers are not followed.
"""

import json
import select
import socket
import sys
from typing import Any

_ALL, _OUTGOING = 0x0003, 4  # ETH_P_ALL (uapi/linux/if_ether.h), PACKET_OUTGOING (if_packet.h)
_IPV4, _IPV6 = 0x0800, 0x86DD
_WITH_PORTS = (6, 17)


def flow_of(kind: int, packet: bytes) -> tuple[int, int, str, int] | None:
    """The flow of an IP packet without its link's header; None if it is something else."""
    if kind == _IPV4:
        protocol, after = packet[9], (packet[0] & 15) * 4
        destination = socket.inet_ntop(socket.AF_INET, packet[16:20])
    elif kind == _IPV6:
        protocol, after = packet[6], 40
        destination = socket.inet_ntop(socket.AF_INET6, packet[24:40])
    else:
        return None
    ports = [int.from_bytes(packet[at : at + 2], "big") for at in (after, after + 2)]
    return (protocol, ports[0], destination, ports[1]) if protocol in _WITH_PORTS else (protocol, 0, destination, 0)


def capture(interface: str) -> list[Any]:
    """Everything that goes out until there is a line of input."""
    seen: set[tuple[int, int, str, int]] = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL)) as tap:
        tap.bind((interface, _ALL))
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([tap, sys.stdin], [], [])
            if tap not in ready:
                return sorted(seen)
            packet, (_, kind, direction, *_) = tap.recvfrom(65535)
            if direction == _OUTGOING and (flow := flow_of(kind, packet)):
                seen.add(flow)


if __name__ == "__main__":
    print(json.dumps(capture(sys.argv[1])), flush=True)
