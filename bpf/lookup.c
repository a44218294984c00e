/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_lookup, one link per pod netns: inbound steering.
 *
 * Runs for packets that belong to no connected socket: SYNs and UDP datagrams. SK_PASS without an assigned socket lets
 * the kernel look up the socket as usual. If a packet is captured but no proxy listens, the program returns SK_DROP and
 * the client gets a RST, so the connection never reaches the application. There is no NAT: the local address of the
 * accepted socket is the original destination.
 *
 * This program type has neither the netns cookie nor socket storage. So it finds the pod by the packet's destination,
 * which is the pod's own address. It recognises self-calls by their source address; ingress_ifindex cannot tell them
 * apart, because it names the NIC for them too.
 */

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
 * Gives the packet to any live listener of the pod's proxy. The kernel refuses a listener of another family than the
 * packet's, so the next slot is tried.
 */
static __always_inline int steer_to_proxy(struct bpf_sk_lookup *ctx, __u64 cookie)
{
    struct listener_key key = {.cookie = cookie, .port = INBOUND_PORT};
    struct bpf_sock *sk;
    int refused;

    for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
        key.slot = slot;
        sk = (struct bpf_sock *)listeners.lookup(&key);
        if (!sk)
            continue;
        refused = bpf_sk_assign(ctx, sk, 0);
        bpf_sk_release(sk);
        if (!refused)
            return SK_PASS;
    }
    return SK_DROP;
}

/* Whether the proxy itself, in TPROXY mode, connects to the application with the client's address as source. */
static __always_inline bool is_proxy_dial(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 cookie,
                                          const struct address *local, const struct address *remote)
{
    struct connection_key key = {.cookie = cookie, .client = *remote, .server = *local};

    if (!(pod->flags & POD_TPROXY))
        return false;
    key.client_port = swap16(ctx->remote_port);
    key.server_port = ctx->local_port;
    return dials.lookup(&key) != 0;
}

int ss_sk_lookup(struct bpf_sk_lookup *ctx)
{
    struct address local, remote;
    struct decision decision;
    struct owner *owner;
    struct pod *pod;
    __u64 cookie;
    int outcome;

    if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
        return SK_PASS;
    local = ADDRESS_OF(ctx, local, ctx->family);
    remote = ADDRESS_OF(ctx, remote, ctx->family);
    if (is_on_lo(&local) || is_on_lo(&remote))
        return SK_PASS;
    owner = addresses.lookup(&local);
    if (!owner)
        return SK_PASS;
    cookie = owner->cookie;
    pod = pods.lookup(&cookie);
    if (!pod || is_own_address(cookie, &remote))
        return SK_PASS;
    if (is_denied_inbound(pod, cookie, ctx->local_port)) {
        note_packet(ctx, cookie, &local, &remote, RULE_DENY, TOTAL_INBOUND_DENIED);
        return SK_DROP;
    }
    if (ctx->protocol != IPPROTO_TCP || (ctx->family == AF_INET6 && !(pod->flags & POD_IPV6)))
        return SK_PASS;
    if (is_proxy_dial(ctx, pod, cookie, &local, &remote))
        return SK_PASS;
    decision = decide_inbound(pod->flags, ctx->local_port, rules_of_port(pod, cookie, ctx->local_port),
                              is_excluded_interface(pod, cookie, ctx->ingress_ifindex));
    if (decision.verdict == VERDICT_PASS) {
        note_packet(ctx, cookie, &local, &remote, decision.rule, TOTAL_INBOUND_DIRECT);
        return SK_PASS;
    }
    outcome = steer_to_proxy(ctx, cookie);
    note_packet(ctx, cookie, &local, &remote, decision.rule,
                outcome == SK_PASS ? TOTAL_INBOUND_CAPTURED : TOTAL_INBOUND_REFUSED);
    return outcome;
}
