/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The capture decision, one pure function each way, in the order of Istio's own rules.
 *
 * Callers gather the facts; nothing here touches a map or a context, so a C compiler can test it. Rule names O1–O10
 * and I3–I5 are those of docs/semantics.md.
 */
#ifndef SIDESTEP_POLICY_H
#define SIDESTEP_POLICY_H

enum verdict {
    VERDICT_PASS,     /* leave the connection alone */
    VERDICT_OUTBOUND, /* to the proxy's outbound listener */
    VERDICT_INBOUND,  /* to the proxy's inbound listener */
};

/* What a connecting socket's hook knows. */
struct outbound {
    __u32 ports;           /* PORT_* of the destination port */
    __u32 network;         /* NETWORK_* of the destination, 0 when no range matches */
    __u16 port;            /* destination */
    bool loopback;         /* the route leaves through lo: 127/8, ::1 or one of the pod's own addresses */
    bool first_loopback;   /* exactly 127.0.0.1 or ::1 (the kernel takes 0.0.0.0 and :: for them) */
    bool from_inbound;     /* bound to 127.0.0.6 or ::6: the proxy's inbound clusters and Istio's app probes */
    bool proxy_uid;        /* owned by the proxy's user */
    bool proxy_gid;        /* owned by the proxy's group */
};

static __always_inline bool is_proxy_self_call(const struct outbound *c)
{
    return c->loopback && !c->first_loopback && c->port != TUNNEL_PORT;
}

static __always_inline enum verdict decide_outbound(__u32 pod_flags, const struct outbound *c)
{
    bool local_to_app = c->loopback && !(pod_flags & POD_LOOPBACK_INCLUDED);

    if (c->ports & PORT_EXCLUDE_OUTBOUND) /* O1 */
        return VERDICT_PASS;
    if (c->loopback && c->from_inbound) /* O2 */
        return VERDICT_PASS;

    if (c->proxy_uid) /* O3a, O3c */
        return is_proxy_self_call(c) ? VERDICT_INBOUND : VERDICT_PASS;
    if (local_to_app) /* O3b: before the group is looked at, as in Istio */
        return VERDICT_PASS;
    if (c->proxy_gid) /* O4a, O4c; O4b is O3b again */
        return is_proxy_self_call(c) ? VERDICT_INBOUND : VERDICT_PASS;

    if (c->first_loopback) /* O7 */
        return VERDICT_PASS;
    if (c->network == NETWORK_EXCLUDED) /* O8 */
        return VERDICT_PASS;
    if (c->ports & PORT_INCLUDE_OUTBOUND) /* O9 */
        return VERDICT_OUTBOUND;
    if ((pod_flags & POD_OUTBOUND_ALL) || c->network == NETWORK_INCLUDED) /* O10 */
        return VERDICT_OUTBOUND;
    return VERDICT_PASS; /* O11 */
}

/* `ports` are the PORT_* of `port`, the packet's destination port. */
static __always_inline enum verdict decide_inbound(__u32 pod_flags, __u16 port, __u32 ports)
{
    if (port == TUNNEL_PORT) /* I3 */
        return VERDICT_PASS;
    if (pod_flags & POD_INBOUND_ALL) /* I4 */
        return ports & PORT_EXCLUDE_INBOUND ? VERDICT_PASS : VERDICT_INBOUND;
    return ports & PORT_INCLUDE_INBOUND ? VERDICT_INBOUND : VERDICT_PASS; /* I2, I5 */
}

#endif
