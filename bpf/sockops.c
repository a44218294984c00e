/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sock_ops: hands the original destination from the connecting socket to the socket that the proxy accepts, registers
 * the proxy's listeners, records the connections that a TPROXY proxy or ztunnel makes to the application, and has
 * connections counted when they close (flows.c).
 *
 * Both ends of a captured connection are in the pod's netns. The connecting end always comes first: its SYN or its ACK
 * creates the accepted socket. So a small map between the two events is enough. The program always returns 1: if one
 * sock_ops program returns 0, the kernel ignores the replies of all.
 */

/* uapi/asm-generic/socket.h */
#define SOL_SOCKET 1
#define SO_MARK 36

static __always_inline bool is_proxy_port(__u32 port)
{
    return port == OUTBOUND_PORT || port == INBOUND_PORT || port == RESOLVER_PORT;
}

static __always_inline struct connection_key connecting_key(struct bpf_sock_ops *ctx, __u64 cookie)
{
    struct connection_key key = {.cookie = cookie};

    key.client = ADDRESS_OF(ctx, local, ctx->family);
    key.server = ADDRESS_OF(ctx, remote, ctx->family);
    key.client_port = ctx->local_port;
    key.server_port = swap32(ctx->remote_port);
    return key;
}

/*
 * The connecting end stores the original destination, before its SYN leaves: with TCP Fast Open, the SYN makes the
 * accepted socket. If the socket was not captured to this port of the proxy's but connects to it, this removes what an
 * aborted connection with the same addresses and ports may have left.
 */
static __always_inline void offer_original(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct connection_key key = connecting_key(ctx, cookie);
    struct socket_state *state;

    if (!is_proxy_port(key.server_port))
        return;
    state = sockets.sk_storage_get(sk, 0, 0);
    if (state && state->flags & SOCKET_CAPTURED && state->proxy_port == key.server_port)
        handshakes.update(&key, &state->original);
    else
        handshakes.delete(&key);
}

/*
 * Offers the original destination again if the map has dropped it before the SYN-ACK, which may have taken seconds. The
 * accepting end has taken it already if the SYN's data are acknowledged (the SYN itself counts one byte).
 */
static __always_inline void keep_offer(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct connection_key key = connecting_key(ctx, cookie);

    if (is_proxy_port(key.server_port) && ctx->bytes_acked <= 1 && !handshakes.lookup(&key))
        offer_original(ctx, sk, cookie);
}

/*
 * Whether a connection that arrives at a proxy port can only be a captured one: it came to an address that captured
 * connections are spread over, or to 127.0.0.1 or ::1 from another address of the pod. Captured connections that stay
 * on loopback look like those that applications open to the proxy themselves, so they do not count.
 */
static __always_inline bool is_surely_captured(__u64 cookie, const struct address *local, const struct address *remote)
{
    if (is_spread6(local) || (is_mapped(local) && (local->word[3] & swap32(~SPREAD4_HOSTS)) == swap32(SPREAD4)))
        return true;
    return is_first_loopback(local) && is_own_address(cookie, remote);
}

static __always_inline void note_lost(__u64 cookie)
{
    __u64 *sum = lost_handovers.lookup(&cookie);

    if (sum)
        *sum += 1;
}

/* The accepting end takes the original destination. Without it the proxy would take its own port for it. */
static __always_inline void take_original(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct connection_key key = {.cookie = cookie};
    struct destination *original;
    struct socket_state *state;

    if (!is_proxy_port(ctx->local_port))
        return;
    key.server_port = ctx->local_port;
    key.client_port = swap32(ctx->remote_port);
    key.client = ADDRESS_OF(ctx, remote, ctx->family);
    key.server = ADDRESS_OF(ctx, local, ctx->family);
    original = handshakes.lookup(&key);
    if (!original) {
        if (is_surely_captured(cookie, &key.server, &key.client))
            note_lost(cookie);
        return;
    }
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state) {
        state->original = *original;
        state->flags |= SOCKET_ACCEPTED;
    } else {
        note_lost(cookie);
    }
    handshakes.delete(&key);
}

/* Whether a connecting socket has the mark with which the proxy reaches its application, and is the proxy's. */
static __always_inline bool is_on_way_to_application(struct bpf_sock *sk, const struct pod *pod,
                                                     const struct socket_state *state)
{
    if (!(state->flags & SOCKET_OPENED))
        return false;
    if (pod->flags & POD_AMBIENT)
        return is_ztunnels(pod, sk->mark, &state->opener);
    return pod->flags & POD_TPROXY && sk->mark == TPROXY_MARK
           && (state->opener.uid == pod->proxy_uid || state->opener.gid == pod->proxy_gid);
}

/*
 * Changes the mark of ztunnel's connection to the application before its SYN leaves. The application's socket takes the
 * mark over, and by this one the pod's routes lead the answers back to ztunnel. The mark that it had could not: with such
 * routes all of ztunnel's connections would end in the pod.
 */
static __always_inline void keep_answers_in_pod(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
    __u32 mark = (sk->mark & ~MARK_BITS) | ORIGINAL_SOURCE_MARK;

    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

/*
 * In TPROXY mode the proxy connects to its application with the client's address as source, and so does ztunnel. The SYN
 * comes through lo and looks like the client's own. lookup.c recognises it by the entry in `dials`, which stays until the
 * socket closes, even if the connection is refused.
 */
static __always_inline void record_dial(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                        __u64 cookie)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct connection_key key;
    __u32 yes = 1;

    if (!(pod->flags & (POD_TPROXY | POD_AMBIENT)) || !state || !is_on_way_to_application(sk, pod, state))
        return;
    key = connecting_key(ctx, cookie);
    if (!is_in_pod(pod, cookie, &key.server) || is_in_pod(pod, cookie, &key.client))
        return;
    dials.update(&key, &yes);
    want_state_changes(ctx);
    if (pod->flags & POD_AMBIENT)
        keep_answers_in_pod(ctx, sk);
}

/* Kubelet connects to somewhere: lookup.c lets it pass if that is a pod in ambient mode. */
static __always_inline void record_kubelets(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct connection_key key;
    __u32 yes = 1;

    if (!state || !(state->flags & SOCKET_KUBELETS))
        return;
    key = connecting_key(ctx, cookie);
    dials.update(&key, &yes);
    want_state_changes(ctx);
}

/* A shadow pod's connection has its addresses and ports now; its SYN is about to leave. */
static __always_inline void watch_connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    struct shadow *decided = shadowed.sk_storage_get(sk, 0, 0);
    struct connection_key ends = connecting_key(ctx, cookie);
    struct shadow_key key = {.cookie = cookie, .protocol = IPPROTO_TCP, .way = WAY_OUT};
    struct shadow record;

    if (!decided)
        return;
    record = *decided;
    key.client = ends.client;
    key.server = ends.server;
    key.client_port = ends.client_port;
    key.server_port = ends.server_port;
    keep_record(&key, &record);
    shadowed.sk_storage_delete(sk);
}

/* The proxy begins to listen, or stops listening. */
static __always_inline void emit_listener(struct bpf_sock_ops *ctx, __u64 cookie, enum event_kind kind)
{
    struct event event = {.kind = kind, .cookie = cookie, .protocol = IPPROTO_TCP};

    if (!is_traced(cookie))
        return;
    event.destination = ADDRESS_OF(ctx, local, ctx->family);
    event.destination_port = ctx->local_port;
    emit(&event);
}

/* Follows and cleans up after a socket that has asked to be told of its states (BPF_SOCK_OPS_STATE_CB_FLAG). */
static __always_inline void follow_state(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 cookie)
{
    __u32 was = ctx->args[0], is = ctx->args[1];
    bool is_counted = follow_flow(ctx, sk, was, is);
    struct connection_key key;

    if (is != BPF_TCP_CLOSE)
        return;
    if (was == BPF_TCP_LISTEN) {
        emit_listener(ctx, cookie, EVENT_CLOSED);
        return;
    }
    if (!is_counted) { /* the proxy's own are never counted */
        key = connecting_key(ctx, cookie);
        dials.delete(&key);
    }
    forget_meeting(sk);
}

/*
 * Stores one of the proxy's listeners in a free slot of its family. If none is free, it takes the last slot, and the
 * others keep older listeners. So the newest listener is always stored: the older ones may be those of a proxy that is
 * about to end.
 */
static __always_inline void add_listener(struct bpf_sock_ops *ctx, __u64 cookie)
{
    struct listener_key key = {.cookie = cookie, .port = INBOUND_PORT};
    __u32 first = first_slot(ctx->family);
    int taken;

    for (int slot = 0; slot < FAMILY_SLOTS - 1; slot++) {
        key.slot = first + slot;
        /* BCC rewrites this call as a whole statement, so it may not be part of another one. */
        taken = listeners.sock_hash_update(ctx, &key, BPF_NOEXIST);
        if (!taken)
            return;
    }
    key.slot = first + FAMILY_SLOTS - 1;
    listeners.sock_hash_update(ctx, &key, BPF_ANY);
}

/*
 * Whether a socket that begins to listen is the proxy's. Of ztunnel's, any that it has opened may be bound first and
 * marked then.
 */
static __always_inline bool is_proxys_listener(struct bpf_sock *sk, const struct pod *pod, __u64 cookie,
                                               const struct socket_state *state)
{
    if (pod->flags & POD_AMBIENT)
        return state->flags & (SOCKET_OPENED | SOCKET_LISTENER) && is_ztunnels(pod, sk->mark, &state->opener);
    return state->flags & SOCKET_LISTENER && container_of(pod, cookie, &state->opener) == CONTAINER_TRUSTED;
}

static __always_inline void register_listener(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                              __u64 cookie)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct address local = ADDRESS_OF(ctx, local, ctx->family);
    __u32 yes = 1;

    if (ctx->local_port != INBOUND_PORT && ctx->local_port != OUTBOUND_PORT)
        return;
    if (!state || !is_proxys_listener(sk, pod, cookie, state))
        return;
    emit_listener(ctx, cookie, EVENT_LISTENING);
    want_state_changes(ctx); /* accepted sockets inherit it; ss_sockops clears it if they are not counted */
    if (ctx->local_port == INBOUND_PORT)
        add_listener(ctx, cookie);
    /*
     * istio-validation listens on 15001 too, before the user's init containers run. But it listens on 127.0.0.1, and
     * Envoy on the unspecified address.
     */
    else if (pod->flags & (POD_EARLY_OUTBOUND | POD_LATE_OUTBOUND) && is_unspecified(&local))
        started.update(&cookie, &yes);
}

int ss_sockops(struct bpf_sock_ops *ctx)
{
    __u32 op = ctx->op;
    struct bpf_sock *sk;
    struct pod *pod;
    __u64 cookie;

    if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_TCP_LISTEN_CB && op != BPF_SOCK_OPS_STATE_CB)
        return 1;
    sk = ctx->sk;
    if (!sk)
        return 1;
    cookie = bpf_get_netns_cookie(ctx);
    if (op == BPF_SOCK_OPS_STATE_CB) { /* before the pod is looked up: the pod may be gone by now */
        follow_state(ctx, sk, cookie);
        return 1;
    }
    if (op == BPF_SOCK_OPS_TCP_CONNECT_CB || op == BPF_SOCK_OPS_TCP_LISTEN_CB)
        end_pairing(sk, cookie); /* also if the pod is not enrolled any more */
    pod = pods.lookup(&cookie);
    if (!pod) {
        if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
            record_kubelets(ctx, sk, cookie);
        return 1;
    }

    if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
        offer_original(ctx, sk, cookie);
        record_dial(ctx, sk, pod, cookie);
        if (is_shadow(terms_of(pod)))
            watch_connecting(ctx, sk, cookie);
    } else if (op == BPF_SOCK_OPS_TCP_LISTEN_CB)
        register_listener(ctx, sk, pod, cookie);
    else if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
        keep_offer(ctx, sk, cookie);
        if (is_shadow(terms_of(pod)))
            return 1;
        offer_meeting(ctx, sk, pod, cookie);
        begin_outbound(ctx, sk, pod, cookie);
    } else {
        if ((is_shadow(terms_of(pod)) || !begin_inbound(ctx, sk, pod, cookie))
            && ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG)
            bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG);
        take_original(ctx, sk, cookie);
        take_meeting(ctx, sk, pod, cookie);
    }
    return 1;
}
