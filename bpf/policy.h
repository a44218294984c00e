/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The capture decision, in the order of Istio's own rules: one pure function for outbound, one for inbound.
 *
 * Callers gather the facts. Nothing here touches a map or a context, so tests can build it with a C compiler. The names
 * of rules, O0–O11, T and I1–I5, are those of docs/semantics.md.
 */
#ifndef SIDESTEP_POLICY_H
#define SIDESTEP_POLICY_H

enum verdict {
    VERDICT_PASS,        /* leave the connection alone */
    VERDICT_OUTBOUND,    /* to the proxy's outbound listener */
    VERDICT_INBOUND,     /* to the proxy's inbound listener */
    VERDICT_DNS,         /* to the agent's resolver beside the proxy */
    VERDICT_REFUSE,      /* the caller may or may not be the proxy: its container is not known yet (strict pods only) */
    VERDICT_UNREACHABLE, /* the kernel would refuse it, so there is nothing to capture */
};

/* The rule that decided, by its name in docs/semantics.md. layout.py has the names in this order. */
enum rule {
    RULE_NONE,
    RULE_O0,
    RULE_O1,
    RULE_O2,
    RULE_O3A,
    RULE_O3B,
    RULE_O3C,
    RULE_O4A,
    RULE_O4C,
    RULE_O6,
    RULE_O7,
    RULE_O8,
    RULE_O9,
    RULE_O10,
    RULE_O11,
    RULE_I1,
    RULE_I3,
    RULE_I4,
    RULE_I5,
    RULE_EARLY,    /* the pod's outbound passes until its proxy listens */
    RULE_DENY,     /* the pod denies the port */
    RULE_NO_ROUTE, /* the pod has no route there, or the kernel does not send from this address */
    RULE_UDP,      /* UDP is not captured, but for DNS */
    RULE_NO_IPV6,  /* the pod's IPv6 is not captured */
    RULE_PROTOCOL, /* neither TCP nor UDP */
    RULE_LATE,     /* the Pod is being deleted, and its proxy listens no more */
    RULE_A2,       /* from here on: pods in ambient mode (ambient_policy.h) */
    RULE_A3,
    RULE_A4,
    RULE_A5,
    RULE_A6,
    RULE_A7,
    RULE_B1,
    RULE_B2,
    RULE_B3,
};

struct decision {
    enum verdict verdict;
    enum rule rule;
    __u32 error; /* errno of the call, if the verdict is VERDICT_UNREACHABLE */
};

#define DECIDED(by, what) ((struct decision){.verdict = what, .rule = by})

/*
 * The container that a socket was opened in. It matters for sockets with the proxy's ids in strict pods, and for sockets
 * with ztunnel's mark in ambient ones.
 */
enum container {
    CONTAINER_TRUSTED, /* the proxy's container, or the pod does not ask about it */
    CONTAINER_OTHER,
    CONTAINER_UNKNOWN, /* the agent has not found the proxy's container yet */
};

/* The facts about an outbound connection or datagram. */
struct outbound {
    __u32 ports;              /* PORT_* of the destination port */
    __u32 network;            /* NETWORK_* of the destination, 0 when no range matches */
    __u32 mark;               /* SO_MARK of the socket */
    enum container container; /* of the socket's opener */
    __u32 route_error;        /* errno that the pod's route to the destination causes, 0 if it may go on */
    __u16 port;               /* destination */
    bool udp;                 /* otherwise TCP */
    bool loopback;       /* the route leaves through lo: 127/8, ::1, one of the pod's own addresses, a local route */
    bool first_loopback; /* exactly 127.0.0.1 or ::1 (the kernel takes 0.0.0.0 and :: for them) */
    bool from_inbound;   /* from 127.0.0.6 or ::6, as the proxy's inbound clusters and Istio's app probes */
    bool multicast;      /* a multicast address, or 255.255.255.255 */
    bool from_loopback;  /* IPv4, bound to an address of 127/8 */
    bool excluded_interface; /* the route leaves through an interface that the pod excludes */
    bool proxy_uid;          /* opened by the proxy's user */
    bool proxy_gid;          /* opened with the proxy's group as primary group */
};

/*
 * The proxy's own connections pass. But as long as the proxy's container is not known, the proxy's ids prove nothing,
 * so connections that leave the pod are refused.
 */
static __always_inline enum verdict verdict_of_proxy(const struct outbound *c)
{
    return c->container == CONTAINER_UNKNOWN && !c->loopback ? VERDICT_REFUSE : VERDICT_PASS;
}

/* The rules that Istio has in the OUTPUT chain of the nat table. */
static __always_inline struct decision decide_redirect(__u32 pod_flags, const struct outbound *c)
{
    bool dns = pod_flags & POD_DNS && c->port == DNS_PORT;
    bool self_call = !c->udp && c->loopback && !c->first_loopback && c->port != TUNNEL_PORT;
    /* With DNS capture, queries to a nameserver in the pod itself are captured too. Other UDP passes, here or below. */
    bool local_to_app = c->loopback && !(pod_flags & POD_LOOPBACK_INCLUDED) && !dns;

    if (c->excluded_interface)
        return DECIDED(RULE_O0, VERDICT_PASS);
    if (c->ports & PORT_EXCLUDE_OUTBOUND)
        return DECIDED(RULE_O1, VERDICT_PASS);
    if (c->loopback && c->from_inbound)
        return DECIDED(RULE_O2, VERDICT_PASS);

    if (c->proxy_uid && self_call && !dns) /* it ends at the proxy, so the opener's container does not matter */
        return DECIDED(RULE_O3A, VERDICT_INBOUND);
    if (c->proxy_uid && c->container != CONTAINER_OTHER)
        return DECIDED(RULE_O3C, verdict_of_proxy(c));
    if (local_to_app) /* before the group is checked, as in Istio */
        return DECIDED(RULE_O3B, VERDICT_PASS);
    if (c->proxy_gid && self_call) /* Istio's O4b repeats O3b */
        return DECIDED(RULE_O4A, VERDICT_INBOUND);
    if (c->proxy_gid && c->container != CONTAINER_OTHER)
        return DECIDED(RULE_O4C, verdict_of_proxy(c));

    if (dns)
        return DECIDED(RULE_O6, VERDICT_DNS);
    if (c->first_loopback)
        return DECIDED(RULE_O7, VERDICT_PASS);
    if (c->network == NETWORK_EXCLUDED)
        return DECIDED(RULE_O8, VERDICT_PASS);
    if (c->udp)
        return DECIDED(RULE_UDP, VERDICT_PASS);
    if (c->ports & PORT_INCLUDE_OUTBOUND)
        return DECIDED(RULE_O9, VERDICT_OUTBOUND);
    if ((pod_flags & POD_OUTBOUND_ALL) || c->network == NETWORK_INCLUDED)
        return DECIDED(RULE_O10, VERDICT_OUTBOUND);
    return DECIDED(RULE_O11, VERDICT_PASS);
}

/* `ports` are the PORT_* of `port`, the packet's destination port. */
static __always_inline struct decision decide_inbound(__u32 pod_flags, __u16 port, __u32 ports, bool excluded_interface)
{
    if (excluded_interface)
        return DECIDED(RULE_I1, VERDICT_PASS);
    if (port == TUNNEL_PORT && !(pod_flags & POD_TPROXY))
        return DECIDED(RULE_I3, VERDICT_PASS);
    if (pod_flags & POD_INBOUND_ALL)
        return DECIDED(RULE_I4, ports & PORT_EXCLUDE_INBOUND ? VERDICT_PASS : VERDICT_INBOUND);
    if (ports & PORT_INCLUDE_INBOUND)
        return DECIDED(RULE_I5, VERDICT_INBOUND);
    return DECIDED(RULE_I5, VERDICT_PASS); /* I2, an empty list, ends here too */
}

/*
 * Rule T. In TPROXY mode, the proxy's connection to its own pod is an inbound connection like any other (Istio marks it
 * 1338). The exception is the proxy's connection to the application, which carries mark 1337 or comes from 127.0.0.6.
 */
static __always_inline bool is_inbound_self_call(__u32 pod_flags, const struct outbound *c)
{
    return pod_flags & POD_TPROXY && !c->udp && c->loopback && !c->first_loopback && !c->from_inbound
           && (c->proxy_uid || c->proxy_gid) && c->mark != TPROXY_MARK;
}

/*
 * The errno with which the kernel would refuse the call, 0 if it would not. With Istio's rules the route is looked up
 * before the rules are asked. Here a captured connection would be sent to the proxy without being routed.
 */
static __always_inline __u32 error_of_route(__u32 pod_flags, const struct outbound *c)
{
    if (c->loopback)
        return 0;
    if (c->multicast && !c->udp)
        return ENETUNREACH;
    if (c->route_error)
        return c->route_error;
    return c->from_loopback && pod_flags & POD_LOOPBACK_STAYS ? EINVAL : 0;
}

/* Rule no-route. A connection that is not captured needs no answer from here: the kernel refuses it. */
static __always_inline struct decision with_route(__u32 pod_flags, const struct outbound *c, struct decision decision)
{
    if (decision.verdict != VERDICT_OUTBOUND && decision.verdict != VERDICT_DNS)
        return decision;
    decision.error = error_of_route(pod_flags, c);
    if (decision.error) {
        decision.verdict = VERDICT_UNREACHABLE;
        decision.rule = RULE_NO_ROUTE;
    }
    return decision;
}

static __always_inline struct decision decide_outbound(__u32 pod_flags, const struct outbound *c)
{
    struct decision decision = decide_redirect(pod_flags, c);

    if (decision.verdict == VERDICT_PASS && is_inbound_self_call(pod_flags, c)) /* T */
        return decide_inbound(pod_flags, c->port, c->ports, c->excluded_interface);
    return decision;
}

#endif
