/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_lookup: inbound steering. Each pod netns has an instance of ss_steer and a link; all of them call ss_sk_lookup.
 *
 * Runs for packets that belong to no connected socket: SYNs and UDP datagrams. SK_PASS without an assigned socket lets
 * the kernel look up the socket as usual. If a packet is captured but no proxy listens, the program returns SK_DROP and
 * the client gets a RST, so the connection never reaches the application. There is no NAT: the local address of the
 * accepted socket is the original destination.
 *
 * This program type can read neither the netns cookie nor socket storage, and no address says which pod a packet is
 * for. So the loader (steering.py) writes the pod's cookie into the pod's own ss_steer, in the place of COOKIE_MARK.
 * ss_steer does nothing else, because it is loaded at every ADD: the verifier takes 2 ms for the whole program.
 */

static __always_inline __u64 own_cookie(void)
{
    __u64 cookie;

    /* In assembly, so that the compiler neither computes with the mark nor stores it in two halves. */
    asm volatile("%0 = 0x7369646573746570 ll" : "=r"(cookie));
    return cookie;
}

_Static_assert(COOKIE_MARK == 0x7369646573746570, "the assembly of own_cookie() has the same number");

/* The last four bytes of the source address; the kernel says 0 for the other family. */
static __always_inline __u32 remote_of(struct bpf_sk_lookup *ctx)
{
    return FIELD(ctx->remote_ip4) | FIELD(ctx->remote_ip6[3]);
}

/* Whether netfilter captures in this pod: then no packet may depend on our programs. */
static __always_inline bool is_watched(__u64 cookie)
{
    struct pod *pod = pods.lookup(&cookie);

    return pod && is_shadow(terms_of(pod));
}

/* If ss_sk_lookup is not there, nobody can say what is captured: the packet is refused. */
int ss_steer(struct bpf_sk_lookup *ctx)
{
    __u32 key = 0;
    struct steered *mine = steered.lookup(&key);

    if (!mine)
        return SK_DROP;
    mine->cookie = own_cookie();
    mine->remote = remote_of(ctx);
    mine->remote_port = ctx->remote_port;
    mine->local_port = ctx->local_port;
    inbound.call(ctx, 0);
    return is_watched(mine->cookie) ? SK_PASS : SK_DROP;
}

/*
 * Whose pod the packet is for, as ss_steer has just said on this CPU. False if another one came between. Packets follow
 * one another on a CPU, but a program that calls bpf_sk_lookup_tcp() for a process may be interrupted by a packet.
 */
static __always_inline bool is_steered(struct bpf_sk_lookup *ctx, __u64 *cookie)
{
    __u32 key = 0;
    struct steered *by = steered.lookup(&key);

    if (!by || by->remote != remote_of(ctx) || by->remote_port != (__u16)ctx->remote_port
        || by->local_port != (__u16)ctx->local_port)
        return false;
    *cookie = by->cookie;
    return true;
}

/* Counts the outcome of a packet and emits its event. */
static __always_inline void note_packet(struct bpf_sk_lookup *ctx, __u64 cookie, const struct address *local,
                                        const struct address *remote, enum rule rule, __u32 counted)
{
    struct event event = {.kind = EVENT_INBOUND, .cookie = cookie, .verdict = counted, .rule = rule};

    count(cookie, counted);
    if (!is_traced(cookie))
        return;
    event.protocol = ctx->protocol;
    event.source = *remote;
    event.source_port = swap16(ctx->remote_port);
    event.destination = *local;
    event.destination_port = ctx->local_port;
    emit(&event);
}

/*
 * Notes a packet that does not go to the proxy. The pod's own datagrams come here too where is_from_itself() does not
 * believe their source.
 */
static __always_inline void note_past(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie,
                                      const struct address *remote, enum rule rule, __u32 outcome)
{
    if (ctx->protocol == IPPROTO_UDP && is_in_pod(pod, cookie, remote))
        return;
    note_arrived(cookie, remote, swap16(ctx->remote_port), ctx->local_port, ctx->protocol, rule, outcome);
}

/*
 * Gives the packet to any live listener of the pod's proxy. The slots of the packet's family come first. An IPv6 listener
 * may serve IPv4 too. If it does not, the kernel refuses it, and the next slot is tried.
 *
 * The kernel then chooses within the listener's SO_REUSEPORT group, but not in ambient mode. Who listens there is root, as
 * ztunnel is, so any root process of the pod can join the group.
 */
static __always_inline int steer_to_proxy(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie)
{
    __u64 how = pod->flags & POD_AMBIENT ? BPF_SK_LOOKUP_F_NO_REUSEPORT : 0;
    struct listener_key key = {.cookie = cookie, .port = INBOUND_PORT};
    __u32 first = first_slot(ctx->family);
    struct bpf_sock *sk;
    int refused;

    for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
        key.slot = slot ^ first;
        sk = (struct bpf_sock *)listeners.lookup(&key);
        if (!sk)
            continue;
        refused = bpf_sk_assign(ctx, sk, how);
        bpf_sk_release(sk);
        if (!refused)
            return SK_PASS;
    }
    return SK_DROP;
}

/* If the client is on this node, tells it in which pod its connection ends (pairing.c). */
static __always_inline void note_arrival(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie,
                                         const struct address *local, const struct address *remote)
{
    struct connection_key key = {.client = *remote, .server = *local};

    if (pod->acceleration == LEVEL_OFF || node_level() == LEVEL_OFF)
        return;
    key.client_port = swap16(ctx->remote_port);
    key.server_port = ctx->local_port;
    arrivals.update(&key, &cookie);
}

/* Whether the proxy itself, in TPROXY or ambient mode, connects to the application with the client's address as source. */
static __always_inline bool is_proxy_dial(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie,
                                          const struct address *local, const struct address *remote)
{
    struct connection_key key = {.cookie = cookie, .client = *remote, .server = *local};

    if (!(pod->flags & (POD_TPROXY | POD_AMBIENT)))
        return false;
    key.client_port = swap16(ctx->remote_port);
    key.server_port = ctx->local_port;
    return dials.lookup(&key) != 0;
}

/*
 * Whether kubelet of this node connects, whose probes are for the application. It is known by address and port, which no
 * other socket of the node has at the same time.
 */
static __always_inline bool is_kubelets(struct bpf_sk_lookup *ctx, const struct pod *pod, const struct address *local,
                                        const struct address *remote)
{
    struct connection_key key = {.client = *remote, .server = *local};
    struct kubelet *known;
    __u32 zero = 0;

    if (!(pod->flags & POD_AMBIENT))
        return false;
    known = kubelet.lookup(&zero);
    if (!known || !known->cgroup)
        return false;
    key.cookie = known->netns;
    key.client_port = swap16(ctx->remote_port);
    key.server_port = ctx->local_port;
    return dials.lookup(&key) != 0;
}

/*
 * Whether the pod has sent the packet to itself, by its source. ingress_ifindex does not say so: it names the NIC for both.
 * A source can be believed where the kernel drops a forged one (IPv4: fib_validate_source; ::1: ip6_rcv), and where one
 * leads to no connection (TCP). Anybody can send UDP over IPv6 from an address of the pod's. To an IPv4 address that is
 * local by a route alone the kernel chooses the same as source.
 */
static __always_inline bool is_from_itself(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie,
                                           const struct address *local, const struct address *remote)
{
    if (ctx->protocol == IPPROTO_UDP && ctx->family == AF_INET6)
        return is_loopback(remote);
    return is_on_lo(remote) || is_same_address(local, remote) || is_in_pod(pod, cookie, remote);
}

/*
 * The interface that a packet for one of the pod's addresses arrived on. Before Linux 5.17 programs are not told. There it
 * is the interface that has the address, 0 if none has it.
 */
static __always_inline __u32 arrival_of(struct bpf_sk_lookup *ctx, __u64 cookie, const struct address *local)
{
#ifdef INGRESS_IFINDEX
    return ctx->ingress_ifindex;
#else
    struct own_address *own = own_address(cookie, local);

    return own ? own->ifindex : 0;
#endif
}

/* Decides by the rules for pods with a sidecar. */
static __always_inline struct decision decide_arrival(struct bpf_sk_lookup *ctx, const struct pod *pod,
                                                      struct terms terms, __u64 cookie, const struct address *local)
{
    return decide_inbound(terms.flags, ctx->local_port, rules_of_port(terms, cookie, ctx->local_port),
                          is_excluded_interface(pod, cookie, arrival_of(ctx, cookie, local)));
}

/*
 * Records what would have been done with a shadow pod's packet. If netfilter has redirected it to the proxy, only
 * conntrack knows the port that it was for. Then the agent decides again.
 */
static __always_inline void watch_packet(struct bpf_sk_lookup *ctx, struct pod *pod, struct terms terms, __u64 cookie,
                                         const struct address *local, const struct address *remote)
{
    struct decision decision = DECIDED(RULE_NO_IPV6, VERDICT_PASS);

    if (ctx->protocol != IPPROTO_TCP || is_proxy_dial(ctx, pod, cookie, local, remote))
        return;
    if (ctx->family == AF_INET || terms.flags & POD_IPV6)
        decision = decide_arrival(ctx, pod, terms, cookie, local);
    watch_arrival(ctx, cookie, local, remote, decision);
}

int ss_sk_lookup(struct bpf_sk_lookup *ctx)
{
    struct address local, remote;
    struct decision decision;
    struct terms terms;
    struct pod *pod;
    __u64 cookie;
    int outcome;

    if (!is_steered(ctx, &cookie))
        return SK_DROP;
    if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
        return SK_PASS;
    local = ADDRESS_OF(ctx, local, ctx->family);
    remote = ADDRESS_OF(ctx, remote, ctx->family);
    pod = pods.lookup(&cookie);
    if (!pod || is_from_itself(ctx, pod, cookie, &local, &remote))
        return SK_PASS;
    terms = terms_of(pod);
    if (is_shadow(terms)) {
        watch_packet(ctx, pod, terms, cookie, &local, &remote);
        return SK_PASS;
    }
    if (is_denied_inbound(terms, cookie, ctx->local_port)) {
        note_packet(ctx, cookie, &local, &remote, RULE_DENY, TOTAL_INBOUND_DENIED);
        note_past(ctx, pod, cookie, &remote, RULE_DENY, OUTCOME_REFUSED);
        return SK_DROP;
    }
    if (ctx->protocol != IPPROTO_TCP || (ctx->family == AF_INET6 && !(terms.flags & POD_IPV6))) {
        note_past(ctx, pod, cookie, &remote, ctx->protocol == IPPROTO_UDP ? RULE_UDP : RULE_NO_IPV6, OUTCOME_PASSED);
        return SK_PASS;
    }
    if (is_proxy_dial(ctx, pod, cookie, &local, &remote))
        return SK_PASS;
    if (is_kubelets(ctx, pod, &local, &remote)) {
        note_packet(ctx, cookie, &local, &remote, RULE_B1, TOTAL_INBOUND_DIRECT);
        return SK_PASS;
    }
    if (pod->flags & POD_AMBIENT)
        decision = decide_ambient_inbound(terms.flags, ctx->local_port);
    else
        decision = decide_arrival(ctx, pod, terms, cookie, &local);
    if (decision.verdict == VERDICT_PASS) {
        note_packet(ctx, cookie, &local, &remote, decision.rule, TOTAL_INBOUND_DIRECT);
        note_past(ctx, pod, cookie, &remote, decision.rule, OUTCOME_PASSED);
        return SK_PASS;
    }
    outcome = steer_to_proxy(ctx, pod, cookie);
    if (outcome == SK_PASS)
        note_arrival(ctx, pod, cookie, &local, &remote);
    else
        note_past(ctx, pod, cookie, &remote, decision.rule, OUTCOME_REFUSED);
    note_packet(ctx, cookie, &local, &remote, decision.rule,
                outcome == SK_PASS ? TOTAL_INBOUND_CAPTURED : TOTAL_INBOUND_REFUSED);
    return outcome;
}
