"""The capture decision for pods in ambient mode, rule by rule as in docs/semantics.md.

Tests compare the kernel with it. Istio's A1 and B1 let kubelet's probes pass by an address that the node's rules give
them as source. sidestep rewrites no addresses: lookup.c recognises kubelet's connections, which are not decided here.
B0, virtual interfaces, can't be done with sockets.
"""

from cni.policy import decision
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.decision import DNS_PORT, TUNNEL_PORT, Action, Inbound, Outbound, Verdict

# SO_MARK of ztunnel's sockets, and of its connections to the application with the client's address as source
ZTUNNEL_MARK = 0x539
ORIGINAL_SOURCE_MARK = 0x111
MARK_BITS = 0xFFF  # Istio's rules compare these bits


def outbound(policy: AmbientPolicy, conn: Outbound) -> Verdict:
    """Rules A2–A7 for a connection that a process in the pod opens.

    `conn.container` says whether the socket was opened in ztunnel's container. It is "unknown" if no ztunnel is known.
    """
    if decision.routed(conn).version == 6 and not policy.ipv6:
        return Verdict("pass", "UDP" if conn.protocol == "udp" else "no IPv6")
    verdict = _redirected(policy, conn)
    if verdict.action in ("proxy-outbound", "dns") and decision.refusal(conn):
        return Verdict("unreachable", "no-route")
    return verdict


def inbound(policy: AmbientPolicy, conn: Inbound) -> Verdict:
    """Rules B2 and B3 for a connection from outside. outbound() decides those over the pod's own loopback."""
    if from_inside := decision.beside_the_rules(conn):
        return from_inside
    if conn.protocol == "udp":
        return Verdict("pass", "UDP")
    if decision.plain(conn.source).version == 6 and not policy.ipv6:
        return Verdict("pass", "no IPv6")
    if conn.port == TUNNEL_PORT or policy.bypass_inbound_capture:
        return Verdict("pass", "B3")
    return Verdict("proxy-inbound", "B2")


def _redirected(policy: AmbientPolicy, conn: Outbound) -> Verdict:
    tcp, lo = conn.protocol == "tcp", decision.is_through_lo(conn)
    is_first_loopback = decision.routed(conn) in decision.FIRST_LOOPBACK
    dns = policy.dns_capture and conn.port == DNS_PORT
    by_ztunnel = _is_marked(policy, conn, ZTUNNEL_MARK)

    if dns and not tcp and not lo and not by_ztunnel:
        return Verdict("dns", "A2")
    if dns and tcp and not is_first_loopback and not by_ztunnel:
        return Verdict("dns", "A3")
    if tcp and _is_marked(policy, conn, ORIGINAL_SOURCE_MARK):
        return Verdict(_of_ztunnel(policy, conn, lo), "A4")
    if lo and not is_first_loopback:
        return Verdict("pass", "A5")
    if tcp and not is_first_loopback and not by_ztunnel:
        return Verdict("proxy-outbound", "A6")
    return Verdict(_of_ztunnel(policy, conn, lo) if by_ztunnel else "pass", "A7")


def _is_marked(policy: AmbientPolicy, conn: Outbound, mark: int) -> bool:
    """Whether the socket is ztunnel's: by its mark, and by the container of its opener unless the mark is trusted."""
    return conn.mark & MARK_BITS == mark and (policy.trust_mark or conn.container != "other")


def _of_ztunnel(policy: AmbientPolicy, conn: Outbound, lo: bool) -> Action:
    """What ztunnel opens passes. If no ztunnel is known, those that leave the pod are refused."""
    return "refuse" if conn.container == "unknown" and not policy.trust_mark and not lo else "pass"
