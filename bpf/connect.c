/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Outbound capture: cgroup/connect4, connect6, getpeername4, getpeername6.
 *
 * connect() of a mesh pod's socket is decided and, when captured, rewritten to the proxy's listener on loopback; what the
 * application asked for stays with the socket. getpeername() gives it back. The hooks may only return 1 (allow): a
 * capture that cannot be set up returns 0, so the connection fails with EPERM instead of leaving in the clear.
 */

/*
 * Where captured connections go: 127.64.0.0/10 or SPREAD6, spread by original destination. With a single address every
 * connection of a pod would share one (destination, port) and its ~28,000 ephemeral ports would be the limit. The agent
 * routes both to lo with the pod's address as preferred source.
 */
static __always_inline void spread_over_loopback(const struct destination *original, struct address *to)
{
    const struct address *a = &original->address;
    __u32 hash = swap32(a->word[0] ^ a->word[1] * 2246822519u ^ a->word[2] ^ a->word[3] * 3266489917u) * 2654435761u;

    hash ^= (hash >> 15) ^ original->port_be * 2246822519u;
    hash ^= hash >> 13;
    if (original->family == AF_INET)
        *to = address_of_ip4(swap32(SPREAD4 | (hash & SPREAD4_HOSTS)));
    else
        *to = (struct address){.word = {SPREAD6_WORD0, SPREAD6_WORD1, a->word[3] ^ a->word[2], hash}};
}

/*
 * Istio's listeners for the proxy's self-calls and for DNS may be on 127.0.0.1 or ::1 alone, so those are not spread; nor
 * is what goes to loopback anyway, and comes from there.
 */
static __always_inline void rewritten_destination(const struct destination *original, enum verdict verdict,
                                                  struct destination *to)
{
    to->family = original->family;
    if (verdict == VERDICT_OUTBOUND && !is_on_lo(&original->address))
        spread_over_loopback(original, &to->address);
    else if (original->family == AF_INET)
        to->address = address_of_ip4(swap32(LOOPBACK4));
    else
        to->address = (struct address){.word = {0, 0, 0, swap32(1)}};
    if (verdict == VERDICT_DNS)
        to->port_be = swap16(RESOLVER_PORT);
    else
        to->port_be = verdict == VERDICT_INBOUND ? swap16(INBOUND_PORT) : swap16(OUTBOUND_PORT);
}

/* Whether this is what the first of two copies of us has rewritten already, as while links move to another cgroup. */
static __always_inline bool is_rewritten(const struct destination *to)
{
    return is_on_lo(&to->address)
           && (to->port_be == swap16(OUTBOUND_PORT) || to->port_be == swap16(INBOUND_PORT)
               || to->port_be == swap16(RESOLVER_PORT));
}

/* A socket that is connected anew and not captured this time must not show an older original destination. */
static __always_inline int pass(struct bpf_sock *sk, const struct destination *to)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

    if (state && !is_rewritten(to))
        state->flags &= ~SOCKET_CAPTURED;
    return ALLOW;
}

static __always_inline bool remember_original(struct bpf_sock *sk, const struct destination *original)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

    if (!state)
        return false;
    state->original = *original;
    state->flags |= SOCKET_CAPTURED;
    return true;
}

/*
 * Bind the source that the connection would have had, so that the proxy sees it. The kernel refuses when the socket has a
 * port but no address: then a spread destination has the route choose the pod's first address, and what goes to the pod
 * itself dials the proxy at the pod's own address, whose natural source is the same.
 */
static __always_inline bool bind_source(struct bpf_sock_addr *ctx, __u32 family, const struct address *address)
{
    struct sockaddr4 source4 = {.family = AF_INET, .ip4 = address->word[3]};
    struct sockaddr6 source6 = {.family = AF_INET6, .address = *address};

    if (family == AF_INET)
        return bpf_bind(ctx, (void *)&source4, sizeof(source4)) == 0;
    return bpf_bind(ctx, (void *)&source6, sizeof(source6)) == 0;
}

/* TCP always, UDP only to a nameserver of a pod whose DNS is captured. */
static __always_inline bool is_of_interest(const struct pod *pod, __u32 protocol, __be16 port_be)
{
    if (protocol == IPPROTO_TCP)
        return true;
    return protocol == IPPROTO_UDP && pod->flags & POD_DNS && port_be == swap16(DNS_PORT);
}

static __always_inline int capture_connection(struct bpf_sock_addr *ctx, __u32 family)
{
    __u64 cookie = bpf_get_netns_cookie(ctx);
    struct pod *pod = pods.lookup(&cookie);
    struct destination to = {}, proxy = {};
    __u32 protocol = ctx->protocol;
    struct bpf_sock *sk = ctx->sk;
    struct address source;
    struct decision decision;

    if (!pod || !sk)
        return ALLOW;
    read_destination(ctx, family, &to);
    source = ADDRESS_OF(sk, src, family);
    if (is_refused_by_pod(pod, cookie, sk, &to, &source))
        return REFUSE;
    if (!is_of_interest(pod, protocol, to.port_be) || (to.family == AF_INET6 && !(pod->flags & POD_IPV6)))
        return pass(sk, &to);

    resolve_unspecified(&to, &source);
    decision = decide(pod, cookie, sk, &to, &source, protocol == IPPROTO_UDP);
    count(cookie, decision.verdict);
    emit_call(cookie, sk, &to, &source, decision, decision.verdict);
    if (decision.verdict == VERDICT_PASS)
        return pass(sk, &to);
    if (decision.verdict == VERDICT_REFUSE || !remember_original(sk, &to))
        return REFUSE;

    rewritten_destination(&to, decision.verdict, &proxy);
    if (is_unspecified(&source) && !is_on_lo(&to.address)) {
        source = source_for(pod, cookie, &to);
        if (!bind_source(ctx, family, &source) && decision.verdict != VERDICT_DNS
            && is_own_address(cookie, &to.address))
            proxy.address = to.address;
    }
    write_destination(ctx, family, &proxy);
    return ALLOW;
}

int ss_connect4(struct bpf_sock_addr *ctx)
{
    return capture_connection(ctx, AF_INET);
}

int ss_connect6(struct bpf_sock_addr *ctx)
{
    return capture_connection(ctx, AF_INET6);
}

static __always_inline int tell_peer(struct bpf_sock_addr *ctx, __u32 family)
{
    struct socket_state *state;
    struct bpf_sock *sk = ctx->sk;

    if (!sk)
        return ALLOW;
    state = sockets.sk_storage_get(sk, 0, 0);
    if (state && state->flags & SOCKET_CAPTURED)
        write_destination(ctx, family, &state->original);
    return ALLOW;
}

int ss_getpeername4(struct bpf_sock_addr *ctx)
{
    return tell_peer(ctx, AF_INET);
}

int ss_getpeername6(struct bpf_sock_addr *ctx)
{
    return tell_peer(ctx, AF_INET6);
}
