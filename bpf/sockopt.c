/* SPDX-License-Identifier: GPL-2.0 */
/*
 * cgroup/getsockopt: answers SO_ORIGINAL_DST (SOL_IP) and IP6T_SO_ORIGINAL_DST (SOL_IPV6). With these, the proxy and
 * istio-validation ask for the original destination of a connection.
 *
 * Runs for every getsockopt() below the cgroup, after the kernel's own getsockopt. All other options return at once. If
 * a connected socket of an enrolled pod was not captured, the answer is the one that conntrack would give: the address
 * that the connecting end asked for. For an accepted socket that is its local address (Envoy's black-hole chains rely
 * on this), for a connecting socket its peer's. Returns 1: the value in retval stands.
 */

#define SOL_IP 0
#define SOL_IPV6 41
#define ORIGINAL_DST 80 /* SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST (uapi/linux/netfilter_ipv4.h, ipv6) */
#define OPTLEN_MAX 4096 /* the program gets one page at most; Documentation/bpf/prog_cgroup_sockopt.rst */
#define TCP_CLOSE 7
#define TCP_LISTEN 10

/* The destination that an accepted socket's peer asked for. If socket() was not seen, a socket counts as accepted. */
static __always_inline void local_destination(struct bpf_sock *sk, struct destination *to)
{
    to->address = ADDRESS_OF(sk, src, sk->family);
    to->port_be = swap16(sk->src_port);
    to->family = family_of(&to->address);
}

/* The destination that a connecting socket asked for. */
static __always_inline void remote_destination(struct bpf_sock *sk, struct destination *to)
{
    to->address = ADDRESS_OF(sk, dst, sk->family);
    to->port_be = sk->dst_port;
    to->family = family_of(&to->address);
}

/*
 * The two context fields lie side by side. volatile keeps the compiler from writing both at once, which the verifier
 * refuses.
 */
static __always_inline void answer(struct bpf_sockopt *ctx, __u32 length)
{
    *(volatile __s32 *)&ctx->optlen = length;
    *(volatile __s32 *)&ctx->retval = 0;
}

static __always_inline int answer4(struct bpf_sockopt *ctx, const struct destination *to)
{
    struct sockaddr4 *out = ctx->optval;

    if ((void *)(out + 1) > ctx->optval_end || to->family != AF_INET)
        return ALLOW;
    out->family = AF_INET;
    out->port_be = to->port_be;
    out->ip4 = to->address.word[3];
    out->zero = 0;
    answer(ctx, sizeof(*out));
    return ALLOW;
}

static __always_inline int answer6(struct bpf_sockopt *ctx, const struct destination *to)
{
    struct sockaddr6 *out = ctx->optval;

    if ((void *)(out + 1) > ctx->optval_end || to->family != AF_INET6)
        return ALLOW;
    out->family = AF_INET6;
    out->port_be = to->port_be;
    out->flowinfo = 0;
    out->address = to->address;
    out->scope = 0;
    answer(ctx, sizeof(*out));
    return ALLOW;
}

int ss_getsockopt(struct bpf_sockopt *ctx)
{
    struct destination to = {};
    struct socket_state *state;
    struct bpf_sock *sk;
    struct pod *pod;
    __u64 cookie;

    if (ctx->optname != ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6)) {
        /*
         * Before Linux 6.5, a getsockopt() longer than a page fails with EFAULT, unless a program sets optlen to 0:
         * then the kernel's own answer stands.
         */
        if (ctx->optlen > OPTLEN_MAX)
            ctx->optlen = 0;
        return ALLOW;
    }
    cookie = bpf_get_netns_cookie(ctx);
    sk = ctx->sk;
    pod = pods.lookup(&cookie);
    if (!sk || !pod)
        return ALLOW;
    if (sk->protocol != IPPROTO_TCP || sk->state == TCP_CLOSE || sk->state == TCP_LISTEN)
        return ALLOW;

    state = sockets.sk_storage_get(sk, 0, 0);
    if (state && state->flags & (SOCKET_ACCEPTED | SOCKET_CAPTURED))
        to = state->original;
    else if (!ctx->retval) /* answered: by another version's program, which has captured the connection (takeover.py) */
        return ALLOW;
    else if (state && state->flags & SOCKET_OPENED)
        remote_destination(sk, &to);
    else
        local_destination(sk, &to);
    if (to.family == AF_INET6 && !(pod->flags & POD_IPV6)) /* as with Istio, which has no IPv6 rules for such a pod */
        return ALLOW;
    return ctx->level == SOL_IP ? answer4(ctx, &to) : answer6(ctx, &to);
}
