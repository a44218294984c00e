/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Outbound capture: cgroup/connect4, connect6, getpeername4, getpeername6.
 *
 * The connect programs decide each connect() of a mesh pod. If it is captured, they rewrite its destination to the
 * proxy's listener on loopback and store the original destination with the socket. getpeername() then returns the
 * original destination. connect returns 1 to allow and 0 to refuse: if a capture cannot be set up, the connection fails
 * with EPERM instead of leaving in the clear. A connection that the kernel would refuse for want of a route fails with
 * the kernel's errno. getpeername always returns 1.
 */

/*
 * Chooses the address that a captured connection goes to, within 127.64.0.0/10 or SPREAD6, by a hash of the original
 * destination. If there were only one address, all connections of a pod would have the same destination and port. The
 * pod could then have only as many as it has ephemeral ports: ~28,000. The agent routes both ranges to lo with the
 * pod's address as preferred source.
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
 * The address and port that a captured connection is rewritten to. Self-calls of the proxy and DNS are not spread,
 * because Istio's listeners for them may be on 127.0.0.1 or ::1 alone. Connections to loopback are not spread either:
 * their source is on loopback too.
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

/*
 * Whether another copy of this program has rewritten the destination already. While links move to another cgroup, the
 * old and the new link both run the program for a moment. An application that disconnects and connects by hand to that
 * very address gains nothing: it could have asked for the same original destination.
 */
static __always_inline bool is_rewritten(const struct socket_state *state, const struct destination *to)
{
    struct destination original = state->original, rewritten = {};

    if (!(state->flags & SOCKET_CAPTURED) || state->proxy_port != swap16(to->port_be))
        return false;
    rewritten_destination(&original, state->proxy_port == OUTBOUND_PORT ? VERDICT_OUTBOUND : VERDICT_DNS, &rewritten);
    return is_same_address(&rewritten.address, &to->address);
}

/* If a socket connects again and is not captured this time, it must not show its earlier original destination. */
static __always_inline int pass(struct bpf_sock *sk, const struct destination *to)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

    if (state && !is_rewritten(state, to))
        state->flags &= ~SOCKET_CAPTURED;
    return ALLOW;
}

static __always_inline bool remember_original(struct bpf_sock *sk, const struct destination *original,
                                              const struct destination *proxy)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

    if (!state)
        return false;
    state->original = *original;
    state->proxy_port = swap16(proxy->port_be);
    state->flags |= SOCKET_CAPTURED;
    return true;
}

/*
 * Binds the socket to the source address that the connection would have had without capture, so that the proxy sees it.
 * The kernel refuses this if the socket is bound to a port but to no address. In that case, a connection to a spread
 * address gets the pod's first address from the route. A connection to the pod itself is sent to the proxy at the pod's
 * own address, because the kernel then chooses that same address as source (capture_connection() does this).
 */
static __always_inline bool bind_source(struct bpf_sock_addr *ctx, __u32 family, const struct address *address)
{
    struct sockaddr4 source4 = {.family = AF_INET, .ip4 = address->word[3]};
    struct sockaddr6 source6 = {.family = AF_INET6, .address = *address};

    if (family == AF_INET)
        return bpf_bind(ctx, (void *)&source4, sizeof(source4)) == 0;
    return bpf_bind(ctx, (void *)&source6, sizeof(source6)) == 0;
}

/* TCP always; UDP only to port 53, if the pod's DNS is captured. */
static __always_inline bool is_of_interest(struct terms terms, __u32 protocol, __be16 port_be)
{
    if (protocol == IPPROTO_TCP)
        return true;
    return protocol == IPPROTO_UDP && terms.flags & POD_DNS && port_be == swap16(DNS_PORT);
}

/*
 * A connect() of somebody whose namespace is no mesh pod's. If it is kubelet, sockops.c records the connection once its
 * port is known. The programs are attached at kubelet's cgroup for this alone. Pods with hostNetwork share kubelet's
 * namespace, but not its cgroup.
 */
static __always_inline int note_kubelet(struct bpf_sock *sk, __u64 cookie)
{
    struct socket_state *state;
    struct kubelet *known;
    __u32 zero = 0;

    known = kubelet.lookup(&zero);
    if (!known || known->netns != cookie || known->cgroup != bpf_get_current_cgroup_id())
        return ALLOW;
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state)
        state->flags |= SOCKET_KUBELETS;
    return ALLOW;
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
    struct terms terms;

    if (!sk)
        return ALLOW;
    if (!pod)
        return note_kubelet(sk, cookie);
    terms = terms_of(pod);
    read_destination(ctx, family, &to);
    source = ADDRESS_OF(sk, src, family);
    if (!is_shadow(terms) && is_refused_by_pod(pod, terms, cookie, sk, &to, &source))
        return REFUSE;
    if (!is_of_interest(terms, protocol, to.port_be) || (to.family == AF_INET6 && !(terms.flags & POD_IPV6))) {
        if (!is_shadow(terms))
            return is_refused_uncaptured(pod, terms, cookie, sk, &to, &source, RULE_NONE) ? REFUSE : pass(sk, &to);
        watch_connect(sk, cookie, &to, DECIDED(RULE_NO_IPV6, VERDICT_PASS));
        return pass(sk, &to);
    }
    resolve_unspecified(&to, &source);
    decision = decide(ctx, pod, terms, cookie, sk, &to, &source, protocol == IPPROTO_UDP);
    if (is_shadow(terms)) {
        watch_connect(sk, cookie, &to, decision);
        return pass(sk, &to);
    }
    if (decision.verdict == VERDICT_PASS && is_refused_uncaptured(pod, terms, cookie, sk, &to, &source, decision.rule))
        return REFUSE;
    count(cookie, decision.verdict);
    emit_call(cookie, sk, &to, &source, decision, decision.verdict);
    if (decision.verdict == VERDICT_PASS)
        return pass(sk, &to);
    if (decision.verdict == VERDICT_REFUSE) {
        note_refused(cookie, sk, &to, decision.rule);
        return REFUSE;
    }
    if (decision.verdict == VERDICT_UNREACHABLE)
        return refuse_with(-(int)decision.error);

    rewritten_destination(&to, decision.verdict, &proxy);
    if (!remember_original(sk, &to, &proxy))
        return REFUSE;
    if (is_unspecified(&source) && !is_on_lo(&to.address)) {
        source = source_for(pod, cookie, &to);
        if (!bind_source(ctx, family, &source) && decision.verdict != VERDICT_DNS
            && is_in_pod(pod, cookie, &to.address))
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
