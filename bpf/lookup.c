/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_lookup, one link per pod netns: inbound steering.
 *
 * Runs for packets that no connected socket takes, which is to say SYNs. SK_PASS without an assigned socket lets the
 * kernel look up as usual; captured but nobody listening is SK_DROP, for which the client gets a RST: never fall
 * through to the application. The accepted socket's local address is the original destination; there is no NAT.
 *
 * This program type has neither netns cookie nor socket storage: the pod is found by its own address, which is the
 * packet's destination. ingress_ifindex does not tell self-calls apart (it names the NIC), the source address does.
 */

/* Counts and tells what becomes of a packet. */
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

/* Any live listener of the pod's proxy; one of another family than the packet's refuses the assignment. */
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

/* TPROXY mode: the proxy on its way to the application, with the address of the client. */
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
