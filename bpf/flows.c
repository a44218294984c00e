/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Flows: with whom a pod's connections were, and what they have carried. Called by sockops when a connection is
 * established and when it closes. TCP counts the bytes itself, so nothing runs in between. Of connections that are open,
 * user space asks the kernel (cni/netns/sock_diag.py); what is stored with the socket says where they belong.
 *
 * Every byte counts once: outbound at the application's socket, whether its other end is the proxy or not, and inbound at
 * the socket that has accepted it from outside of the pod. The proxy's own connections are not counted, neither those to
 * elsewhere nor those to its application. Nor is what stays in the pod.
 *
 * A pod may have FLOWS_PER_POD entries. The agent removes the oldest ones in time. If there is no room for a new one, it
 * is dropped and counted. The sums in `flow_sums` and `flow_totals` stay right all the same.
 */

#define MS 1000000ULL /* ns */
#define SECONDS (1000 * MS)
/* bpf_sock_ops has the round trip time in eighths of µs, as the kernel does */
#define RTT_SHIFT 3

/* Adds to the flags, which all programs share: those of another program, such as a tracer, stay set. */
static __always_inline void want_state_changes(struct bpf_sock_ops *ctx)
{
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline __u32 lifetime_of(__u64 ns)
{
    return (ns > 10 * MS) + (ns > 100 * MS) + (ns > SECONDS) + (ns > 10 * SECONDS) + (ns > 60 * SECONDS)
           + (ns > 600 * SECONDS) + (ns > 3600 * SECONDS) + (ns > 86400 * SECONDS);
}

/* Has the connection added to the flow of this key when it closes. `since` comes last: without it nothing is added. */
static __always_inline void count_from_now(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct flow_key *key)
{
    struct counted *counted_as = counted.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

    if (!counted_as)
        return;
    counted_as->key = *key;
    counted_as->received = 0;
    counted_as->since = bpf_ktime_get_ns();
    want_state_changes(ctx);
}

/* A connection of this pod is established. If the proxy has made it, or if it stays in the pod, it is not counted. */
static __always_inline void begin_outbound(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                           __u64 cookie)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct flow_key key = {.cookie = cookie, .way = FLOW_DIRECT};

    if (!state || (state->flags & SOCKET_OPENED && is_proxys(pod, cookie, sk->mark, &state->opener)))
        return;
    if (state->flags & SOCKET_CAPTURED) {
        key.way = FLOW_CAPTURED;
        key.remote = state->original.address;
        key.port = swap16(state->original.port_be);
    } else {
        key.remote = ADDRESS_OF(ctx, remote, ctx->family);
        key.port = swap32(ctx->remote_port);
        if (!(state->flags & SOCKET_OPENED) || is_on_lo(&key.remote) || is_in_pod(pod, cookie, &key.remote))
            return;
    }
    count_from_now(ctx, sk, &key);
}

/* Whether the connection that a socket has accepted comes from outside of the pod. It may be the proxy's own. */
static __always_inline bool is_from_outside(struct bpf_sock_ops *ctx, const struct pod *pod, __u64 cookie)
{
    struct connection_key ends = {.cookie = cookie, .client_port = swap32(ctx->remote_port)};

    ends.client = ADDRESS_OF(ctx, remote, ctx->family);
    ends.server = ADDRESS_OF(ctx, local, ctx->family);
    ends.server_port = ctx->local_port;
    if (is_on_lo(&ends.client) || is_on_lo(&ends.server) || is_in_pod(pod, cookie, &ends.client))
        return false;
    return !(pod->flags & (POD_TPROXY | POD_AMBIENT)) || !dials.lookup(&ends);
}

/* A socket of this pod has accepted a connection. What others ask the sidecar itself is not the application's. */
static __always_inline bool begin_inbound(struct bpf_sock_ops *ctx, struct bpf_sock *sk, const struct pod *pod,
                                          __u64 cookie)
{
    struct flow_key key = {.cookie = cookie, .way = FLOW_INBOUND, .port = ctx->local_port};

    if ((!(pod->flags & POD_AMBIENT) && is_sidecars_own(key.port)) || !is_from_outside(ctx, pod, cookie))
        return false;
    count_from_now(ctx, sk, &key);
    return true;
}

/*
 * The application's bytes of a connection that closes, from the state `was`. TCP counts the SYN of a connecting socket
 * and each FIN as a byte, once it is acknowledged.
 */
static __always_inline void read_bytes(struct bpf_sock_ops *ctx, const struct counted *of, __u32 was, struct flow *sum)
{
    bool is_fin_sent = was == BPF_TCP_FIN_WAIT2
                       || ((was == BPF_TCP_LAST_ACK || was == BPF_TCP_CLOSING) && ctx->snd_una == ctx->snd_nxt);
    bool is_fin_received = was == BPF_TCP_CLOSE_WAIT || was == BPF_TCP_LAST_ACK || was == BPF_TCP_CLOSING;

    sum->sent = ctx->bytes_acked;
    sum->received = ctx->bytes_received;
    /*
     * From FIN_WAIT2 it closes because a FIN came, or because the process has closed it before one came. If bytes have
     * come since we had ended, the last one is taken for a FIN: wrong by one byte for a process that ends its own half,
     * reads, and closes without waiting for the end.
     */
    if (was == BPF_TCP_FIN_WAIT2 && sum->received != of->received)
        is_fin_received = true;
    sum->sent -= is_fin_sent + (of->key.way != FLOW_INBOUND);
    sum->received -= is_fin_received;
}

static __always_inline void add_flow(struct flow *to, const struct flow *sum)
{
    __sync_fetch_and_add(&to->connections, 1);
    __sync_fetch_and_add(&to->sent, sum->sent);
    __sync_fetch_and_add(&to->received, sum->received);
    if (sum->retransmits)
        __sync_fetch_and_add(&to->retransmits, sum->retransmits);
    __sync_fetch_and_add(&to->rtt, sum->rtt);
    __sync_fetch_and_add(&to->timed, sum->timed);
    __sync_fetch_and_add(&to->duration, sum->duration);
    to->last = sum->last;
}

/* The node's sums: each CPU has its own. */
static __always_inline void add_to_node(const struct flow *sum, __u32 direction)
{
    struct flow *total = flow_totals.lookup(&direction);
    __u32 lifetime = lifetime_of(sum->duration);
    __u64 *lived = lifetimes.lookup(&lifetime);

    if (lived)
        *lived += 1;
    if (!total)
        return;
    total->connections += 1;
    total->sent += sum->sent;
    total->received += sum->received;
    total->retransmits += sum->retransmits;
    total->rtt += sum->rtt;
    total->timed += sum->timed;
    total->duration += sum->duration;
}

/* A new entry, if the pod and the map have room. */
static __always_inline void begin_flow(struct flow_key *key, struct flow *sum, struct flow_sums *sums)
{
    __u64 cookie = key->cookie;
    __u64 *gone = flows_forgotten.lookup(&cookie);
    struct flow *there;
    int refused;

    if (has_room(sums->added, gone, FLOWS_PER_POD)) {
        refused = flows.insert(key, sum);
        if (!refused) {
            __sync_fetch_and_add(&sums->added, 1);
            return;
        }
        there = flows.lookup(key); /* another CPU may have been first */
        if (there) {
            add_flow(there, sum);
            return;
        }
    }
    __sync_fetch_and_add(&sums->dropped, 1);
}

/* Adds a connection that closes, from the state `was`, unless its pod has gone. */
static __always_inline void end_flow(struct bpf_sock_ops *ctx, struct counted *of, __u32 was)
{
    struct flow sum = {.connections = 1, .last = bpf_ktime_get_ns()};
    struct flow_key key = of->key;
    __u64 cookie = key.cookie;
    struct flow_sums *sums = flow_sums.lookup(&cookie);
    struct flow *entry;

    sum.duration = sum.last - of->since;
    of->since = 0;
    if (!sums)
        return;
    read_bytes(ctx, of, was, &sum);
    sum.retransmits = ctx->total_retrans;
    sum.rtt = ctx->srtt_us >> RTT_SHIFT;
    sum.timed = sum.rtt != 0;
    add_to_node(&sum, key.way == FLOW_INBOUND);
    add_flow(key.way == FLOW_INBOUND ? &sums->inbound : &sums->outbound, &sum);
    entry = flows.lookup(&key);
    if (entry)
        add_flow(entry, &sum);
    else
        begin_flow(&key, &sum, sums);
}

/* A socket changes its state to `is`. Returns whether its connection is, or was, a counted one. */
static __always_inline bool follow_flow(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u32 was, __u32 is)
{
    struct counted *of;

    if (was == BPF_TCP_LISTEN || (is != BPF_TCP_FIN_WAIT2 && is != BPF_TCP_CLOSE))
        return false;
    of = counted.sk_storage_get(sk, 0, 0);
    if (!of)
        return false;
    if (!of->since)
        return true;
    if (is == BPF_TCP_CLOSE)
        end_flow(ctx, of, was);
    else
        of->received = ctx->bytes_received;
    return true;
}
