/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_msg: hands what is sent on an accelerated connection to the receiving socket, past TCP. Passing a message on is
 * always safe, redirecting one only while two things hold, which are looked at for each message:
 *
 *   order   The receiver has read all that was ever written to TCP in this direction: it reads redirected bytes before
 *           those that TCP has for it. What was redirected before is no hindrance to passing, for the same reason. So
 *           either path may follow the other at any time, but for one thing: a reader that TCP has put to sleep until
 *           more comes (MSG_WAITALL, SO_RCVLOWAT) has taken in what TCP had, and nothing but TCP wakes it. A proxy does
 *           not sleep there, nor does whoever reads without blocking; anybody else stays with TCP once he has been there.
 *   memory  The receiver has read most of what was redirected to it. The kernel sets no limit to that queue; once our
 *           own is reached the message goes through TCP, whose window stops the sender in the end; so does one that
 *           comes while the node is short of memory for sockets.
 *
 * The fields are read from the kernel's own structures, at the offsets of this kernel (offsets.py). A socket that is gone
 * may be read too, but nothing is redirected to it then: it left the socket hash before its memory did.
 */

#ifdef ACCELERATION
/* Bytes redirected and unread from which on messages pass: a quarter of what TCP itself buffers (tcp_rmem) or less */
#define BACKLOG_BUDGET (512 * 1024)
/*
 * After so many messages in a row that are smaller than this, none queues behind others: such a stream is cheaper in TCP,
 * which joins them. But only where a proxy reads: no read returns redirected bytes and those behind them in TCP together,
 * and an application (nginx) may take a short read for all there is.
 */
#define STREAM_MESSAGE 4096
#define STREAM_RUN 4
/* O_NONBLOCK (uapi/asm-generic/fcntl.h) */
#define NONBLOCK 04000
/* The low bits of sk_user_data are flags (SK_USER_DATA_PTRMASK, include/net/sock.h) */
#define USER_DATA_MASK (~7ULL)

static __always_inline bool has_ulp(__u64 socket)
{
    return read64(socket, TCP_ULP_OPS) != 0;
}

/* Whether the receiver's calls return at once when there is nothing; whoever has no descriptor yet may have any. */
static __always_inline bool never_sleeps(__u64 socket)
{
    __u64 file = read64(read64(socket, SOCK_SOCKET), SOCKET_FILE);

    return read32(file, FILE_FLAGS) & NONBLOCK;
}

/*
 * Both ends count the same bytes: what is written, be it sent by now or not, and what is read of it. Urgent bytes count at
 * both; FIN does too, but nobody writes after it; window probes are not written, and acknowledgements do not matter.
 */
static __always_inline bool is_drained(struct pairing *pairing)
{
    struct connection *connection = &pairing->peer.connection;
    __u32 first = pairing->peer.side == SIDE_SERVER ? connection->client_sequence : connection->server_sequence;
    __u32 written = read32(pairing->own_socket, TCP_WRITE_SEQ);

    if (written != first)
        pairing->has_passed = 1;
    if (written != read32(pairing->peer_socket, TCP_COPIED_SEQ))
        return false;
    return !pairing->has_passed || pairing->to_proxy || never_sleeps(pairing->peer_socket);
}

/*
 * Whether TCP as a whole holds as much as the first mark of tcp_mem. Beyond the second the kernel may refuse a redirected
 * message its memory, and the sender gets ENOMEM, on which proxies break the connection; TCP would merely let it wait.
 */
static __always_inline bool is_memory_short(const struct pairing *pairing)
{
    return (__s64)read64(pairing->allocated, 0) >= (__s64)read64(pairing->marks, 0);
}

/* Whether the receiver has too much unread already for one more message. */
static __always_inline bool is_behind(const struct pairing *pairing)
{
    __u64 psock = read64(pairing->peer_socket, SOCK_USER_DATA) & USER_DATA_MASK;
    __u32 backlog;

    if (!psock)
        return true;
#ifdef PSOCK_MSG_TOT_LEN
    backlog = read32(psock, PSOCK_MSG_TOT_LEN);
    return backlog >= BACKLOG_BUDGET || (backlog && pairing->small > STREAM_RUN && pairing->to_proxy);
#else
    return read64(psock, PSOCK_INGRESS_MSG) != psock + PSOCK_INGRESS_MSG; /* list_empty() */
#endif
}

/* The connecting end learns here who its peer is. */
static __always_inline bool knows_peer(struct pairing *pairing, __u64 cookie)
{
    struct connection connection;
    struct meeting *meeting;

    if (pairing->peer_socket)
        return true;
    connection = pairing->peer.connection;
    meeting = meetings.lookup(&connection);
    if (!meeting) /* the other end has declined */
        pairing->level = LEVEL_NEVER;
    if (!meeting || !meeting->server)
        return false;
    /* another CPU's two writes, seen in another order */
    if (pairing->level == LEVEL_PROXY && meeting->cookie == cookie)
        return false;
    pairing->peer.cookie = meeting->cookie;
    pairing->peer_socket = meeting->server;
    meetings.delete(&connection);
    return true;
}

int ss_message(struct sk_msg_md *ctx)
{
    struct bpf_sock *sk = ctx->sk;
    struct pairing *pairing;
    struct traffic *sums;
    struct end_key peer;
    __u32 size = ctx->size;
    __u64 cookie;
    int found;

    if (!sk)
        return SK_PASS;
    pairing = pairings.sk_storage_get(sk, 0, 0);
    if (!pairing || pairing->level > node_level())
        return SK_PASS;
    cookie = bpf_get_netns_cookie(ctx);
    sums = traffic.lookup(&cookie);
    if (!sums)
        return SK_PASS;
    if (!knows_peer(pairing, cookie)) {
        sums->no_peer++;
        return SK_PASS;
    }
    pairing->small = size < STREAM_MESSAGE ? pairing->small + 1 : 0;
    if (!is_drained(pairing) || has_ulp(pairing->own_socket) || has_ulp(pairing->peer_socket)) {
        sums->undrained++;
        return SK_PASS;
    }
    if (is_behind(pairing) || is_memory_short(pairing)) {
        sums->over_budget++;
        return SK_PASS;
    }
    peer = pairing->peer;
    found = accelerated.msg_redirect_hash(ctx, &peer, BPF_F_INGRESS);
    if (found != SK_PASS) {
        sums->no_peer++;
        return SK_PASS;
    }
    sums->redirected++;
    sums->redirected_bytes += size;
    return SK_PASS;
}
#endif
