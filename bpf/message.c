/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_msg: runs for each message that is sent on an accelerated connection. It redirects the message to the receiving
 * socket, past TCP, or lets it go by TCP. TCP is always safe. Redirecting is safe only if two conditions hold, which
 * are checked for each message:
 *
 * Order. The receiver reads redirected bytes before bytes that TCP has for it. So a message is redirected only if the
 * receiver has read everything that was ever written to TCP in this direction. A message may go by TCP at any time: the
 * receiver reads what was redirected before it first. So either path may follow the other. There is one exception: a
 * reader that TCP has put to sleep in the middle of a read (MSG_WAITALL, SO_RCVLOWAT). It has taken everything TCP had,
 * but only TCP can wake it. Proxies and non-blocking readers never sleep inside a read. Any other reader gets
 * everything by TCP.
 *
 * Peeking. One call never returns both redirected bytes and TCP's bytes, MSG_PEEK included. A reader that looks at a
 * connection's first bytes before it reads them, as Envoy's listener filters do, would wait for ever for bytes that TCP
 * has behind unread redirected ones. So each direction begins with TCP. Nothing is redirected until the receiver has
 * read some of it, because from then on the receiver knows what it deals with.
 *
 * Memory. The kernel sets no limit to the queue of redirected bytes. So if the receiver has BACKLOG_BUDGET unread, or
 * the node or the receiver's container is short of memory (room.c), the message goes by TCP, whose window stops the
 * sender in the end.
 *
 * The program reads fields of the kernel's own structures, at the offsets of this kernel (offsets.py). It may read a
 * socket that is gone. But it redirects nothing to such a socket, because a socket leaves the socket hash before its
 * memory is freed.
 */

#ifdef ACCELERATION
/*
 * If the receiver has this many redirected bytes unread, messages go by TCP. It is at most a quarter of what TCP itself
 * buffers (tcp_rmem).
 */
#define BACKLOG_BUDGET (512 * 1024)
/*
 * If more than STREAM_RUN messages in a row are smaller than SMALL_MESSAGE bytes, and the receiver was behind at each of
 * them, a message goes by TCP whenever redirected bytes are unread: TCP joins small messages, which is cheaper. This holds only if the reader is a proxy.
 * One read never returns both redirected bytes and TCP's bytes, and an application (nginx) may take a short read for
 * all there is.
 */
#define SMALL_MESSAGE 4096
#define STREAM_RUN 4
/*
 * Among a direction's first PEEKED bytes that many small messages in a row may be unread. After a listener filter that
 * reads (PROXY protocol), another one may peek, at no more than this. The limit is for the kernel's own memory: each
 * message takes about 1 KiB besides its bytes.
 */
#define PEEKED (64 * 1024)
#define PEEKED_RUN 256
/* O_NONBLOCK (uapi/asm-generic/fcntl.h) */
#define NONBLOCK 04000
/* The low bits of sk_user_data are flags (SK_USER_DATA_PTRMASK, include/net/sock.h) */
#define USER_DATA_MASK (~7ULL)

static __always_inline bool has_ulp(__u64 socket)
{
    return read64(socket, TCP_ULP_OPS) != 0;
}

/*
 * Whether the receiving socket is non-blocking, so that its reader never sleeps inside a read. False if the socket has
 * no file yet, because it may still become blocking.
 */
static __always_inline bool never_sleeps(__u64 socket)
{
    __u64 file = read64(read64(socket, SOCK_SOCKET), SOCKET_FILE);

    return read32(file, FILE_FLAGS) & NONBLOCK;
}

/* The sequence number of this direction's first byte. */
static __always_inline __u32 first_sequence(const struct pairing *pairing)
{
    const struct connection *connection = &pairing->peer.connection;

    return pairing->peer.side == SIDE_SERVER ? connection->client_sequence : connection->server_sequence;
}

/* How many bytes of this direction have been written to TCP; more than 4 GiB count from 0 again. */
static __always_inline __u32 written_to_tcp(const struct pairing *pairing)
{
    return read32(pairing->own_socket, TCP_WRITE_SEQ) - first_sequence(pairing);
}

/*
 * Whether this message may be redirected as far as order and peeking go: bytes were written to TCP in this direction,
 * and the receiver has read as many. The sender counts written bytes (write_seq), whether or not TCP has sent them; the
 * receiver counts bytes read, not those it has peeked at (copied_seq). Urgent bytes count at both ends. FIN counts too,
 * but nothing is written after it. Window probes and acknowledgements count at neither.
 */
static __always_inline bool is_drained(const struct pairing *pairing)
{
    __u32 written = written_to_tcp(pairing);

    if (!written || first_sequence(pairing) + written != read32(pairing->peer_socket, TCP_COPIED_SEQ))
        return false;
    return pairing->to_proxy || never_sleeps(pairing->peer_socket);
}

/* How many small messages in a row a proxy may get past TCP while it has others unread. */
static __always_inline __u32 longest_run(const struct pairing *pairing)
{
    return written_to_tcp(pairing) + pairing->redirected < PEEKED ? PEEKED_RUN : STREAM_RUN;
}

/*
 * Whether this message would be too much: the receiver is behind, or memory is short. Kernels that do not count
 * redirected bytes have no PSOCK_MSG_TOT_LEN. There, one unread message is too much. If the receiver has nothing unread,
 * a small message is never too much for its container: that many bytes any connection costs.
 */
static __always_inline bool is_over_budget(struct pairing *pairing, __u32 size)
{
    __u64 psock = read64(pairing->peer_socket, SOCK_USER_DATA) & USER_DATA_MASK;
    __u32 backlog = 0;

    if (!psock)
        return true;
#ifdef PSOCK_MSG_TOT_LEN
    backlog = read32(psock, PSOCK_MSG_TOT_LEN);
    if (!backlog) /* who has read everything keeps up with small messages, as in a ping-pong of two each way */
        pairing->small = size < SMALL_MESSAGE;
    if (backlog >= BACKLOG_BUDGET || (backlog && pairing->to_proxy && pairing->small > longest_run(pairing)))
        return true;
#else
    if (read64(psock, PSOCK_INGRESS_MSG) != psock + PSOCK_INGRESS_MSG) /* !list_empty() */
        return true;
#endif
    if (is_memory_short(pairing))
        return true;
    return (backlog || size >= SMALL_MESSAGE) && is_container_short(pairing, backlog + size);
}

/* Whether this end knows its peer. The connecting end learns it here, from the meeting. */
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
    /* take_meeting() writes server after cookie. On another CPU, server may be seen before cookie: try again later. */
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
    pairing->small = size < SMALL_MESSAGE ? pairing->small + 1 : 0;
    if (!is_drained(pairing) || has_ulp(pairing->own_socket) || has_ulp(pairing->peer_socket)) {
        sums->undrained++;
        return SK_PASS;
    }
    if (is_over_budget(pairing, size)) {
        sums->over_budget++;
        return SK_PASS;
    }
    peer = pairing->peer;
    found = accelerated.msg_redirect_hash(ctx, &peer, BPF_F_INGRESS);
    if (found != SK_PASS) {
        sums->no_peer++;
        return SK_PASS;
    }
    if (pairing->redirected < PEEKED)
        pairing->redirected += size;
    sums->redirected++;
    sums->redirected_bytes += size;
    return SK_PASS;
}
#endif
