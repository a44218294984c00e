/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_msg: hands what is sent on an accelerated connection to the receiving socket, past TCP. Passing a message on is
 * always safe, redirecting one only while two things hold, which are looked at for each message:
 *
 *   order   TCP has nothing under way in this direction: all sent bytes are acknowledged, all received ones read. A
 *           receiver reads redirected bytes before those that TCP has for it, so none may be there. What was redirected
 *           before is no hindrance to passing, for the same reason. So either path may follow the other at any time.
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
 * Smaller messages than this do not queue behind others: a stream of them is cheaper in TCP, which joins them. But only where
 * a proxy reads: no read returns redirected bytes and those behind them in TCP together, and an application (nginx) may
 * take a short read for all there is.
 */
#define STREAM_MESSAGE 4096
/* The low bits of sk_user_data are flags (SK_USER_DATA_PTRMASK, include/net/sock.h) */
#define USER_DATA_MASK (~7ULL)

static __always_inline __u32 read32(__u64 from, __u32 offset)
{
    __u32 value = 0;

    bpf_probe_read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

static __always_inline __u64 read64(__u64 from, __u32 offset)
{
    __u64 value = 0;

    bpf_probe_read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

static __always_inline bool has_ulp(__u64 socket)
{
    return read64(socket, TCP_ULP_OPS) != 0;
}

static __always_inline bool is_drained(const struct pairing *pairing)
{
    return read32(pairing->own_socket, TCP_WRITE_SEQ) == read32(pairing->own_socket, TCP_SND_UNA)
           && read32(pairing->peer_socket, TCP_COPIED_SEQ) == read32(pairing->peer_socket, TCP_RCV_NXT);
}

/*
 * Whether TCP as a whole holds as much as the first mark of tcp_mem. Beyond the second the kernel may refuse a redirected
 * message its memory, and the sender gets ENOMEM, on which proxies break the connection; TCP would merely let it wait.
 */
static __always_inline bool is_memory_short(const struct pairing *pairing)
{
    __u64 protocol = read64(pairing->own_socket, SOCK_PROT);
    __u64 allocated = read64(protocol, PROTO_MEMORY_ALLOCATED);
    __u64 marks = read64(protocol, PROTO_SYSCTL_MEM);

    return (__s64)read64(allocated, 0) >= (__s64)read64(marks, 0);
}

/* Whether the receiver has too much unread already for one more message of this size. */
static __always_inline bool is_behind(const struct pairing *pairing, __u32 size)
{
    __u64 psock = read64(pairing->peer_socket, SOCK_USER_DATA) & USER_DATA_MASK;
    __u32 backlog;

    if (!psock)
        return true;
#ifdef PSOCK_MSG_TOT_LEN
    backlog = read32(psock, PSOCK_MSG_TOT_LEN);
    return backlog >= BACKLOG_BUDGET || (backlog && size < STREAM_MESSAGE && pairing->to_proxy);
#else
    return read64(psock, PSOCK_INGRESS_MSG) != psock + PSOCK_INGRESS_MSG; /* list_empty() */
#endif
}

/* The connecting end learns here who its peer is. */
static __always_inline bool knows_peer(struct pairing *pairing)
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
    if (!knows_peer(pairing)) {
        sums->no_peer++;
        return SK_PASS;
    }
    if (!is_drained(pairing) || has_ulp(pairing->own_socket) || has_ulp(pairing->peer_socket)) {
        sums->undrained++;
        return SK_PASS;
    }
    if (is_behind(pairing, size) || is_memory_short(pairing)) {
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
