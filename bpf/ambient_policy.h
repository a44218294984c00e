/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The capture decision for pods in ambient mode: one pure function for outbound, one for inbound, as in policy.h.
 *
 * Such a pod has no proxy of its own. The node's ztunnel opens sockets in the pod's network namespace, and marks all of
 * them. The names of rules, A2–A7, B2 and B3, are those of docs/semantics.md.
 */
#ifndef SIDESTEP_AMBIENT_POLICY_H
#define SIDESTEP_AMBIENT_POLICY_H

/*
 * Whether ztunnel has opened the socket: it has the mark, and its opener is in ztunnel's container. The mark alone proves
 * nothing, since CAP_NET_RAW is enough to set it. Where no ztunnel is known, the answer is yes, for verdict_of_ztunnel().
 */
static __always_inline bool is_marked(const struct outbound *c, __u32 mark)
{
    return (c->mark & MARK_BITS) == mark && c->container != CONTAINER_OTHER;
}

/*
 * ztunnel's own connections pass. But as long as no ztunnel is known, the mark may be anybody's: what leaves the pod is
 * refused. To capture it could be worse, because a connection of ztunnel's would come back to ztunnel for ever.
 */
static __always_inline enum verdict verdict_of_ztunnel(const struct outbound *c)
{
    return verdict_of_proxy(c);
}

static __always_inline struct decision decide_ambient_outbound(__u32 pod_flags, const struct outbound *c)
{
    bool dns = pod_flags & POD_DNS && c->port == DNS_PORT;
    bool by_ztunnel = is_marked(c, ZTUNNEL_MARK);

    if (dns && c->udp && !c->loopback && !by_ztunnel)
        return DECIDED(RULE_A2, VERDICT_DNS);
    if (dns && !c->udp && !c->first_loopback && !by_ztunnel) /* also to the pod's own addresses, unlike UDP */
        return DECIDED(RULE_A3, VERDICT_DNS);
    if (!c->udp && is_marked(c, ORIGINAL_SOURCE_MARK))
        return DECIDED(RULE_A4, verdict_of_ztunnel(c));
    if (c->loopback && !c->first_loopback)
        return DECIDED(RULE_A5, VERDICT_PASS);
    if (!c->udp && !c->first_loopback && !by_ztunnel)
        return DECIDED(RULE_A6, VERDICT_OUTBOUND);
    return DECIDED(RULE_A7, by_ztunnel ? verdict_of_ztunnel(c) : VERDICT_PASS);
}

/* For a connection from outside of the pod. `port` is its destination port. */
static __always_inline struct decision decide_ambient_inbound(__u32 pod_flags, __u16 port)
{
    if (port != TUNNEL_PORT && !(pod_flags & POD_BYPASS_INBOUND))
        return DECIDED(RULE_B2, VERDICT_INBOUND);
    return DECIDED(RULE_B3, VERDICT_PASS);
}

#endif
