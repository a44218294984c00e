/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shadow pods: records what the programs would have done, for the agent to compare with what netfilter did. Called by
 * connect.c, datagram.c, sockops.c and lookup.c.
 *
 * conntrack knows a connection by its addresses and ports. At connect() a socket has no port yet, so the decision is kept
 * with the socket until sockops is told that the SYN is about to leave. A UDP socket that is connected gets its port
 * after connect(), and nobody is told: those are only counted.
 */

static __always_inline void keep_record(struct shadow_key *key, struct shadow *record)
{
    __u64 cookie = key->cookie;
    struct shadow_counts *counts = shadow_counts.lookup(&cookie);
    int failed;

    if (!counts)
        return;
    record->time = bpf_ktime_get_ns();
    failed = shadows.update(key, record);
    if (failed)
        __sync_fetch_and_add(&counts->dropped, 1);
}

static __always_inline struct shadow record_of(struct bpf_sock *sk, struct decision decision)
{
    struct shadow record = {.verdict = decision.verdict, .rule = decision.rule};
    struct opener who = opener_of(sk);
    struct caller_of_note by = noted_caller(who.uid);

    record.pid = by.pid;
    record.uid = by.uid;
    __builtin_memcpy(record.command, by.command, sizeof(record.command));
    return record;
}

/* A connect(): what is decided waits for the socket's port. */
static __always_inline void watch_connect(struct bpf_sock *sk, __u64 cookie, const struct destination *to,
                                          struct decision decision)
{
    struct shadow_counts *counts;
    struct shadow *kept;

    if (sk->protocol == IPPROTO_UDP && to->port_be == swap16(DNS_PORT)) {
        counts = shadow_counts.lookup(&cookie);
        if (counts)
            __sync_fetch_and_add(&counts->unnamed, 1);
    }
    if (sk->protocol != IPPROTO_TCP)
        return;
    kept = shadowed.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (kept)
        *kept = record_of(sk, decision);
}

/* The source address of a query whose socket is not bound to one. */
static __always_inline struct address source_of_unbound(const struct pod *pod, __u64 cookie, struct destination *to)
{
    if (!is_on_lo(&to->address))
        return source_for(pod, cookie, to);
    if (to->family == AF_INET)
        return address_of_ip4(swap32(LOOPBACK4));
    return is_first_loopback(&to->address) ? (struct address){.word = {0, 0, 0, swap32(1)}} : to->address;
}

/* A query over UDP. */
static __always_inline void watch_query(const struct pod *pod, __u64 cookie, struct bpf_sock *sk,
                                        struct destination *to, const struct address *bound, struct decision decision)
{
    struct shadow_key key = {.cookie = cookie, .server = to->address, .protocol = IPPROTO_UDP, .way = WAY_OUT};
    struct shadow record = record_of(sk, decision);

    key.client = is_unspecified(bound) ? source_of_unbound(pod, cookie, to) : *bound;
    key.client_port = sk->src_port;
    key.server_port = DNS_PORT;
    keep_record(&key, &record);
}

/* A SYN, of which the kernel looks up the listener: netfilter has seen it already. Also other packets without a socket. */
static __always_inline void watch_arrival(struct bpf_sk_lookup *ctx, __u64 cookie, const struct address *local,
                                          const struct address *remote, struct decision decision)
{
    struct shadow_key key = {.cookie = cookie, .client = *remote, .server = *local, .way = WAY_IN};
    struct shadow record = {.verdict = decision.verdict, .rule = decision.rule};

    key.client_port = swap16(ctx->remote_port);
    key.server_port = ctx->local_port;
    key.protocol = IPPROTO_TCP;
    keep_record(&key, &record);
}
