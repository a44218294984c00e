/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sock_ops: hands the original destination from the connecting socket to the accepted one, and registers listeners.
 *
 * Both ends are in the pod's netns and the connecting side always reaches ESTABLISHED first (its ACK creates the other
 * socket), so a small map between the two events is enough. Always returns 1: 0 would suppress other programs' replies.
 */

static __always_inline struct address local_address(struct bpf_sock_ops *ctx)
{
    return address_of_family(ctx->family, FIELD(ctx->local_ip4), FIELD(ctx->local_ip6[0]), FIELD(ctx->local_ip6[1]),
                             FIELD(ctx->local_ip6[2]), FIELD(ctx->local_ip6[3]));
}

static __always_inline struct address remote_address(struct bpf_sock_ops *ctx)
{
    return address_of_family(ctx->family, FIELD(ctx->remote_ip4), FIELD(ctx->remote_ip6[0]), FIELD(ctx->remote_ip6[1]),
                             FIELD(ctx->remote_ip6[2]), FIELD(ctx->remote_ip6[3]));
}

static __always_inline bool is_proxy_port(__u32 port)
{
    return port == OUTBOUND_PORT || port == INBOUND_PORT;
}

/* The connecting end. A direct connection to the proxy clears what an aborted one with the same addresses left. */
static __always_inline void offer_original(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct handshake_key key = {.cookie = cookie};
    struct socket_state *state;

    key.server_port = swap32(ctx->remote_port);
    if (!is_proxy_port(key.server_port))
        return;
    key.client_port = ctx->local_port;
    key.client = local_address(ctx);
    key.server = remote_address(ctx);
    state = sockets.sk_storage_get(sk, 0, 0);
    if (state && state->flags & SOCKET_CAPTURED)
        handshakes.update(&key, &state->original);
    else
        handshakes.delete(&key);
}

/* The accepting end. */
static __always_inline void take_original(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct handshake_key key = {.cookie = cookie};
    struct destination *original;
    struct socket_state *state;

    if (!is_proxy_port(ctx->local_port))
        return;
    key.server_port = ctx->local_port;
    key.client_port = swap32(ctx->remote_port);
    key.client = remote_address(ctx);
    key.server = local_address(ctx);
    original = handshakes.lookup(&key);
    if (!original)
        return;
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state) {
        state->original = *original;
        state->flags |= SOCKET_ACCEPTED;
    }
    handshakes.delete(&key);
}

/* One of the proxy's listeners takes the first free slot; sixteen live ones are enough, any serves the group. */
static __always_inline void register_listener(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct listener_key key = {.cookie = cookie, .port = INBOUND_PORT};
    struct socket_state *state;
    int taken;

    if (ctx->local_port != INBOUND_PORT)
        return;
    state = sockets.sk_storage_get(sk, 0, 0);
    if (!state || !(state->flags & SOCKET_LISTENER))
        return;
    for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
        key.slot = slot;
        /* BCC rewrites this call as a whole statement, so its result needs one of its own. */
        taken = listeners.sock_hash_update(ctx, &key, BPF_NOEXIST);
        if (!taken)
            return;
    }
}

int ss_sockops(struct bpf_sock_ops *ctx)
{
    struct bpf_sock *sk;
    __u64 cookie;

    if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
        return 1;
    sk = ctx->sk;
    if (!sk)
        return 1;
    cookie = bpf_get_netns_cookie(ctx);
    if (!pods.lookup(&cookie))
        return 1;

    if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
        offer_original(ctx, sk, cookie);
    else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        take_original(ctx, sk, cookie);
    else
        register_listener(ctx, sk, cookie);
    return 1;
}
