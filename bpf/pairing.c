/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which connections are accelerated, and how their two ends find each other. Called by sockops when a connection is
 * established.
 *
 * The connecting end is established first. It writes a meeting. The key consists of the connection's addresses, ports
 * and first sequence numbers; the accepting end computes the same key. Only the other end of that very connection, on
 * this node, can find the meeting, so a socket with a remote peer is never paired. Either both ends enter the socket
 * hash or neither: if the accepting end declines or finds no room in the hash, it removes the connecting end again and
 * both stay on TCP.
 */

static __always_inline __u32 node_level(void)
{
    __u32 zero = 0;
    struct node *settings = node.lookup(&zero);

    return settings ? settings->acceleration : LEVEL_OFF;
}

#ifdef ACCELERATION
/*
 * Whether a socket is TCP without Multipath TCP and without an upper-layer protocol (kernel TLS): these have data paths
 * of their own. False also if the fields cannot be read.
 */
static __always_inline bool is_plain_tcp(__u64 socket)
{
    __u64 ulp = 1;
#ifdef TCP_IS_MPTCP
    __u8 mptcp = 1;

    read_kernel(&mptcp, sizeof(mptcp), (void *)(socket + TCP_IS_MPTCP));
    if (mptcp)
        return false;
#endif
    read_kernel(&ulp, sizeof(ulp), (void *)(socket + TCP_ULP_OPS));
    return !ulp;
}

static __always_inline bool is_captured(struct bpf_sock *sk)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

    return state && state->flags & SOCKET_CAPTURED;
}

/* Whether lookup.c gives a connection from another pod to the proxy. Only such connections are accelerated. */
static __always_inline bool is_accepted_by_proxy(const struct pod *pod, __u64 cookie,
                                                 const struct connection *connection)
{
    __u16 port = connection->server_port;
    struct terms terms = terms_of(pod);

    if (is_shadow(terms))
        return false;
    if (terms.flags & POD_INTERFACES) /* the interface by which the connection came is not known here */
        return false;
    if (!(terms.flags & POD_IPV6) && !is_mapped(&connection->server))
        return false;
    return decide_inbound(terms.flags, port, rules_of_port(terms, cookie, port), false).verdict != VERDICT_PASS;
}

/*
 * The netns cookie of the pod of this node whose proxy has received the SYN of this connection; 0 if there is none.
 * lookup.c has noted it: it runs in the namespace of the server before the client is established. An address could not
 * tell, because pods may share it. If somebody forges such a SYN, nothing is paired: a meeting needs the sequence numbers
 * of the real server.
 */
static __always_inline __u64 pod_arrived_at(const struct connection *connection)
{
    struct connection_key key = {.client = connection->client,
                                 .server = connection->server,
                                 .client_port = connection->client_port,
                                 .server_port = connection->server_port};
    __u64 *found = arrivals.lookup(&key);
    __u64 cookie = found ? *found : 0;

    if (found)
        arrivals.delete(&key);
    return cookie;
}

/*
 * The level that a connecting socket's connection needs; LEVEL_OFF if it is never accelerated. If the connection goes
 * to another pod, `allowed` is lowered to the level of that pod.
 */
static __always_inline __u32 level_needed(const struct pod *pod, __u64 cookie, struct bpf_sock *sk,
                                          struct connection *connection, __u32 *allowed)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct pod *other;
    __u64 arrived;
    bool proxy;

    if (!state || !(state->flags & SOCKET_OPENED))
        return LEVEL_OFF;
    if (state->flags & SOCKET_CAPTURED)
        return LEVEL_FULL;
    proxy = (state->opener.uid == pod->proxy_uid || state->opener.gid == pod->proxy_gid)
            && container_of(pod, cookie, &state->opener) == CONTAINER_TRUSTED;
    if (!proxy)
        return LEVEL_OFF;
    if (is_on_lo(&connection->server))
        return LEVEL_FULL;
    if (is_own_address(cookie, &connection->server))
        return LEVEL_FULL;
    arrived = pod_arrived_at(connection);
    other = pods.lookup(&arrived);
    if (!other || !is_accepted_by_proxy(other, arrived, connection))
        return LEVEL_OFF;
    if (other->acceleration < *allowed)
        *allowed = other->acceleration;
    return LEVEL_PROXY;
}

/*
 * Removes a socket from the map before it connects again or listens. A socket that was disconnected (connect() to
 * AF_UNSPEC) is still in the map: its earlier peer could reach it, and unread bytes of the earlier connection would
 * still be there.
 */
static __always_inline void end_pairing(struct bpf_sock *sk, __u64 cookie)
{
    struct pairing *pairing = pairings.sk_storage_get(sk, 0, 0);
    struct end_key own;

    if (!pairing)
        return;
    own = pairing->peer;
    own.cookie = cookie;
    own.side = own.side == SIDE_SERVER ? SIDE_CLIENT : SIDE_SERVER;
    accelerated.delete(&own);
    pairings.sk_storage_delete(sk);
}

/*
 * Makes the pairing of a socket; 0 if the socket cannot be accelerated. The socket's own address in the kernel is
 * stored and read back: the verifier allows arithmetic with the number that is read, but not with the pointer.
 */
static __always_inline struct pairing *begin_pairing(struct bpf_sock *sk)
{
    struct pairing *pairing = pairings.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    __u64 protocol;

    if (!pairing)
        return 0;
    pairing->own_socket = (__u64)sk;
    pairing->level = LEVEL_NEVER;
    if (is_plain_tcp(FIELD(pairing->own_socket))) {
        protocol = read64(FIELD(pairing->own_socket), SOCK_PROT);
        pairing->allocated = read64(protocol, PROTO_MEMORY_ALLOCATED);
        pairing->marks = read64(protocol, PROTO_SYSCTL_MEM);
        return pairing;
    }
    pairings.sk_storage_delete(sk);
    return 0;
}

/* The connecting end writes a meeting and enters the socket hash. */
static __always_inline void offer_meeting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                          __u64 cookie)
{
    struct end_key own = {.cookie = cookie, .side = SIDE_CLIENT};
    struct meeting meeting = {.cookie = cookie, .client = (__u64)sk};
    __u32 allowed = node_level();
    struct pairing *pairing;
    int refused;

    if (pod->acceleration < allowed)
        allowed = pod->acceleration;
    if (allowed == LEVEL_OFF)
        return;
    own.connection.client = ADDRESS_OF(ctx, local, ctx->family);
    own.connection.server = ADDRESS_OF(ctx, remote, ctx->family);
    own.connection.client_port = ctx->local_port;
    own.connection.server_port = swap32(ctx->remote_port);
    own.connection.client_sequence = ctx->snd_nxt;
    own.connection.server_sequence = ctx->rcv_nxt;
    meeting.level = level_needed(pod, cookie, sk, &own.connection, &allowed);
    meeting.captured = is_captured(sk);
    if (meeting.level == LEVEL_OFF || meeting.level > allowed)
        return;

    pairing = begin_pairing(sk);
    if (!pairing)
        return;
    refused = meetings.update(&own.connection, &meeting);
    if (refused)
        return;
    refused = accelerated.sock_hash_update(ctx, &own, BPF_ANY);
    if (refused) {
        meetings.delete(&own.connection);
        return;
    }
    pairing->peer = own;
    pairing->peer.side = SIDE_SERVER;
    /* The peer's namespace is not known yet. The peer writes it into the meeting; knows_peer() takes it from there. */
    pairing->peer.cookie = 0;
    pairing->to_proxy = meeting.level == LEVEL_PROXY || meeting.captured;
    pairing->level = meeting.level;
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Whether the accepting end takes part in the meeting that the connecting end offers. */
static __always_inline bool is_acceptable(const struct meeting *meeting, const struct pod *pod, __u64 cookie,
                                          const struct connection *connection)
{
    if (meeting->level > pod->acceleration || is_shadow(terms_of(pod)))
        return false;
    if (meeting->level == LEVEL_FULL)
        return meeting->cookie == cookie;
    return is_accepted_by_proxy(pod, cookie, connection);
}

/*
 * The accepting end declines: it removes the meeting, and the connecting end from the socket hash. The missing meeting
 * tells the connecting end that it has no peer. No byte is lost, because only the accepting end could have redirected
 * bytes to the connecting end.
 */
static __always_inline void decline(const struct meeting *meeting, struct connection *connection)
{
    struct end_key client = {.cookie = meeting->cookie, .connection = *connection, .side = SIDE_CLIENT};

    meetings.delete(connection);
    accelerated.delete(&client);
}

/*
 * The accepting end finds the meeting, enters the socket hash and tells the connecting end about itself, or declines.
 */
static __always_inline void take_meeting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                         __u64 cookie)
{
    struct end_key own = {.cookie = cookie, .side = SIDE_SERVER};
    struct pairing *pairing = 0;
    struct meeting *meeting;
    int refused = -1;

    if (node_level() == LEVEL_OFF)
        return;
    own.connection.client = ADDRESS_OF(ctx, remote, ctx->family);
    own.connection.server = ADDRESS_OF(ctx, local, ctx->family);
    own.connection.client_port = swap32(ctx->remote_port);
    own.connection.server_port = ctx->local_port;
    own.connection.client_sequence = ctx->rcv_nxt;
    own.connection.server_sequence = ctx->snd_nxt;
    meeting = meetings.lookup(&own.connection);
    if (!meeting)
        return;
    if (is_acceptable(meeting, pod, cookie, &own.connection))
        pairing = begin_pairing(sk);
    if (pairing) {
        pairing->peer = own;
        pairing->peer.side = SIDE_CLIENT;
        pairing->peer.cookie = meeting->cookie;
        pairing->peer_socket = meeting->client;
        pairing->to_proxy = !meeting->captured;
        pairing->level = meeting->level;
        refused = accelerated.sock_hash_update(ctx, &own, BPF_ANY);
    }
    if (refused) {
        if (pairing)
            pairings.sk_storage_delete(sk);
        decline(meeting, &own.connection);
        return;
    }
    meeting->cookie = cookie; /* from now on the meeting tells the client about this end */
    meeting->server = (__u64)sk;
}

/* Removes the meeting of a client that closes without having sent anything. */
static __always_inline void forget_meeting(struct bpf_sock *sk)
{
    struct pairing *pairing = pairings.sk_storage_get(sk, 0, 0);
    struct connection connection;

    if (!pairing || pairing->peer_socket || pairing->peer.side != SIDE_SERVER)
        return;
    connection = pairing->peer.connection;
    meetings.delete(&connection);
}
#else
static __always_inline void offer_meeting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                          __u64 cookie)
{
}

static __always_inline void take_meeting(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                         __u64 cookie)
{
}

static __always_inline void forget_meeting(struct bpf_sock *sk)
{
}

static __always_inline void end_pairing(struct bpf_sock *sk, __u64 cookie)
{
}
#endif
