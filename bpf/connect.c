/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Outbound capture: cgroup/connect4, connect6, getpeername4, getpeername6.
 *
 * connect() of a mesh pod's socket is decided and, when captured, rewritten to the proxy's listener on loopback; what the
 * application asked for stays with the socket. getpeername() gives it back. The hooks may only return 1 (allow): a
 * capture that cannot be set up returns 0, so the connection fails with EPERM instead of leaving in the clear.
 */

#define ALLOW 1
#define REFUSE 0

/* sockaddr_in and sockaddr_in6 as bpf_bind() wants them (uapi/linux/in.h, in6.h). */
struct bind4 {
    __u16 family;
    __be16 port_be;
    __be32 ip4;
    __u64 zero;
};

struct bind6 {
    __u16 family;
    __be16 port_be;
    __be32 flowinfo;
    struct address address;
    __u32 scope;
};

/*
 * Where captured IPv4 connections go: 127.64.0.0/10, spread by original destination. With a single address every
 * connection of a pod would share one (destination, port) and its ~28,000 ephemeral ports would be the limit.
 */
static __always_inline __be32 spread_over_loopback(const struct destination *original)
{
    __u32 hash = swap32(original->address.word[3]) * 2654435761u ^ original->port_be * 2246822519u;

    hash ^= hash >> 15;
    return swap32(0x7f400000 | (hash & 0x003fffff));
}

/* Gather the facts and decide. `source` is what the socket is bound to. */
static __always_inline enum verdict decide(struct pod *pod, __u64 cookie, struct destination *to, struct address *source)
{
    __u64 ids = bpf_get_current_uid_gid();
    struct outbound facts = {.port = swap16(to->port_be)};

    facts.ports = rules_of_port(pod, cookie, facts.port);
    facts.network = network_of(pod, cookie, to);
    facts.first_loopback = is_first_loopback(&to->address);
    facts.loopback = is_on_lo(&to->address) || is_own_address(cookie, &to->address);
    facts.from_inbound = is_inbound_source(source);
    facts.proxy_uid = (__u32)ids == pod->proxy_uid;
    facts.proxy_gid = (__u32)(ids >> 32) == pod->proxy_gid;
    return decide_outbound(pod->flags, &facts);
}

/* A socket that is connected anew and not captured this time must not show an older original destination. */
static __always_inline void forget_original(struct bpf_sock *sk, const struct destination *to)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

    /* Unless this is the second of two copies of us, as while links move to another cgroup, after the first rewrote. */
    if (is_loopback(&to->address) && (to->port_be == swap16(OUTBOUND_PORT) || to->port_be == swap16(INBOUND_PORT)))
        return;
    if (state)
        state->flags &= ~SOCKET_CAPTURED;
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
 * Bind the pod's address as source, so that the proxy sees it. False when the socket has a port but no address: the
 * kernel refuses a second bind, and the caller dials the pod's own address instead, whose natural source is itself.
 */
static __always_inline bool bind_source4(struct bpf_sock_addr *ctx, struct pod *pod)
{
    struct bind4 source = {.family = AF_INET, .ip4 = pod->source4.word[3]};

    return bpf_bind(ctx, &source, sizeof(source)) == 0;
}

static __always_inline bool bind_source6(struct bpf_sock_addr *ctx, const struct address *address)
{
    struct bind6 source = {.family = AF_INET6, .address = *address};

    return bpf_bind(ctx, &source, sizeof(source)) == 0;
}

int ss_connect4(struct bpf_sock_addr *ctx)
{
    __u64 cookie = bpf_get_netns_cookie(ctx);
    struct pod *pod = pods.lookup(&cookie);
    struct bpf_sock *sk = ctx->sk;
    struct destination to = {};
    struct address source;
    enum verdict verdict;
    __be32 proxy;

    if (!pod || !sk || ctx->protocol != IPPROTO_TCP)
        return ALLOW;

    to.address = address_of_ip4(ctx->user_ip4);
    to.port_be = ctx->user_port;
    to.family = AF_INET;
    source = address_of_ip4(sk->src_ip4);
    verdict = decide(pod, cookie, &to, &source);
    if (verdict == VERDICT_PASS) {
        forget_original(sk, &to);
        return ALLOW;
    }

    if (!remember_original(sk, &to))
        return REFUSE;
    /* istio-validation listens on 127.0.0.1 alone, so the proxy's self-calls are not spread. */
    proxy = verdict == VERDICT_INBOUND ? swap32(LOOPBACK4) : spread_over_loopback(&to);
    if (source.word[3] == 0 && !(verdict == VERDICT_INBOUND && is_on_lo(&to.address))
        && !bind_source4(ctx, pod))
        proxy = pod->source4.word[3];
    ctx->user_ip4 = proxy;
    ctx->user_port = verdict == VERDICT_INBOUND ? swap16(INBOUND_PORT) : swap16(OUTBOUND_PORT);
    return ALLOW;
}

/* The rewritten destination of an AF_INET6 socket: mapped 127/8 for ::ffff:a.b.c.d, else ::1. */
static __always_inline void proxy_address6(struct destination *to, enum verdict verdict, struct address *proxy)
{
    if (to->family == AF_INET)
        *proxy = address_of_ip4(verdict == VERDICT_INBOUND ? swap32(LOOPBACK4) : spread_over_loopback(to));
    else
        *proxy = (struct address){.word = {0, 0, 0, swap32(1)}};
}

int ss_connect6(struct bpf_sock_addr *ctx)
{
    __u64 cookie = bpf_get_netns_cookie(ctx);
    struct pod *pod = pods.lookup(&cookie);
    struct bpf_sock *sk = ctx->sk;
    struct destination to = {};
    struct address source, own, proxy;
    enum verdict verdict;

    if (!pod || !sk || ctx->protocol != IPPROTO_TCP)
        return ALLOW;

    to.address.word[0] = ctx->user_ip6[0];
    to.address.word[1] = ctx->user_ip6[1];
    to.address.word[2] = ctx->user_ip6[2];
    to.address.word[3] = ctx->user_ip6[3];
    to.port_be = ctx->user_port;
    /* Java, .NET and Go dial IPv4 as ::ffff:a.b.c.d on an AF_INET6 socket: that is IPv4, and no connect4 will run. */
    to.family = is_mapped(&to.address) ? AF_INET : AF_INET6;
    if (to.family == AF_INET6 && !(pod->flags & POD_IPV6)) {
        forget_original(sk, &to);
        return ALLOW;
    }

    source.word[0] = sk->src_ip6[0];
    source.word[1] = sk->src_ip6[1];
    source.word[2] = sk->src_ip6[2];
    source.word[3] = sk->src_ip6[3];
    verdict = decide(pod, cookie, &to, &source);
    if (verdict == VERDICT_PASS) {
        forget_original(sk, &to);
        return ALLOW;
    }

    if (!remember_original(sk, &to))
        return REFUSE;
    proxy_address6(&to, verdict, &proxy);
    own = to.family == AF_INET ? pod->source4 : pod->source6;
    if ((is_zero(&source) || (is_mapped(&source) && source.word[3] == 0))
        && !(verdict == VERDICT_INBOUND && is_on_lo(&to.address)) && !bind_source6(ctx, &own))
        proxy = own;
    ctx->user_ip6[0] = proxy.word[0];
    ctx->user_ip6[1] = proxy.word[1];
    ctx->user_ip6[2] = proxy.word[2];
    ctx->user_ip6[3] = proxy.word[3];
    ctx->user_port = verdict == VERDICT_INBOUND ? swap16(INBOUND_PORT) : swap16(OUTBOUND_PORT);
    return ALLOW;
}

static __always_inline struct destination *captured_original(struct bpf_sock_addr *ctx)
{
    struct socket_state *state;
    struct bpf_sock *sk = ctx->sk;

    if (!sk)
        return 0;
    state = sockets.sk_storage_get(sk, 0, 0);
    return state && state->flags & SOCKET_CAPTURED ? &state->original : 0;
}

int ss_getpeername4(struct bpf_sock_addr *ctx)
{
    struct destination *original = captured_original(ctx);

    if (original) {
        ctx->user_ip4 = original->address.word[3];
        ctx->user_port = original->port_be;
    }
    return ALLOW;
}

int ss_getpeername6(struct bpf_sock_addr *ctx)
{
    struct destination *original = captured_original(ctx);

    if (original) {
        ctx->user_ip6[0] = original->address.word[0];
        ctx->user_ip6[1] = original->address.word[1];
        ctx->user_ip6[2] = original->address.word[2];
        ctx->user_ip6[3] = original->address.word[3];
        ctx->user_port = original->port_be;
    }
    return ALLOW;
}
