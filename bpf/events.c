/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tells `sidestep trace` what happens, while it is there. Nobody waits for it: an event for which the ring has no room is
 * lost and counted. The reader renews its interest, so that one that was killed costs nothing for long.
 */

static __always_inline bool is_traced(__u64 cookie)
{
    __u32 zero = 0;
    struct tracing *interest = tracing.lookup(&zero);

    if (!interest || !interest->until)
        return false;
    if (interest->cookie && interest->cookie != cookie)
        return false;
    return bpf_ktime_get_ns() < interest->until;
}

static __always_inline void emit(struct event *event)
{
    __u32 zero = 0;
    __u64 *sum;

    event->time = bpf_ktime_get_ns();
    if (!events.ringbuf_output(event, sizeof(*event), 0))
        return;
    sum = lost.lookup(&zero);
    if (sum)
        *sum += 1;
}

/* A call of connect() or sendmsg(). `counted` is the enum total. */
static __always_inline void emit_call(__u64 cookie, struct bpf_sock *sk, const struct destination *to,
                                      const struct address *source, struct decision decision, __u32 counted)
{
    struct event event = {.kind = EVENT_CONNECT};
    struct opener who;

    if (!is_traced(cookie))
        return;
    who = opener_of(sk);
    event.cookie = cookie;
    event.verdict = counted;
    event.rule = decision.rule;
    event.protocol = sk->protocol;
    event.pid = bpf_get_current_pid_tgid() >> 32;
    event.uid = who.uid;
    event.source = *source;
    event.source_port = sk->src_port;
    event.destination = to->address;
    event.destination_port = swap16(to->port_be);
    bpf_get_current_comm(event.command, sizeof(event.command));
    emit(&event);
}

/* Whether the pod denies this destination; counted and told. The caller refuses. */
static __always_inline bool is_refused_by_pod(const struct pod *pod, __u64 cookie, struct bpf_sock *sk,
                                              struct destination *to, const struct address *source)
{
    if (!is_denied_outbound(pod, cookie, to))
        return false;
    count(cookie, TOTAL_OUTBOUND_DENIED);
    emit_call(cookie, sk, to, source, DECIDED(RULE_DENY, VERDICT_REFUSE), TOTAL_OUTBOUND_DENIED);
    return true;
}
