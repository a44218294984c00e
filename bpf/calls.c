/* SPDX-License-Identifier: GPL-2.0 */
/* For connect.c and datagram.c: the event of a call, what the pod denies, and the error of a refused call. */

/* Emits the event of one connect() or sendmsg(). `counted` is the enum total that counted it. */
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
#ifdef CALLER /* these program types may ask for the calling process since Linux 6.1 */
    event.pid = bpf_get_current_pid_tgid() >> 32;
    bpf_get_current_comm(event.command, sizeof(event.command));
#endif
    event.uid = who.uid;
    event.source = *source;
    event.source_port = sk->src_port;
    event.destination = to->address;
    event.destination_port = swap16(to->port_be);
    emit(&event);
}

/* Whether the pod denies this destination. If so, this counts the call and emits its event; the caller refuses it. */
static __always_inline bool is_refused_by_pod(const struct pod *pod, struct terms terms, __u64 cookie,
                                              struct bpf_sock *sk, struct destination *to, const struct address *source)
{
    if (!is_denied_outbound(pod, terms, cookie, to))
        return false;
    count(cookie, TOTAL_OUTBOUND_DENIED);
    note_refused(cookie, sk, to, RULE_DENY);
    emit_call(cookie, sk, to, source, DECIDED(RULE_DENY, VERDICT_REFUSE), TOTAL_OUTBOUND_DENIED);
    return true;
}

/*
 * Whether the pod denies what is not captured by this rule (RULE_NONE: no rule was asked). If so, this counts the call and
 * emits its event; the caller refuses it.
 */
static __always_inline bool is_refused_uncaptured(struct pod *pod, struct terms terms, __u64 cookie,
                                                  struct bpf_sock *sk, const struct destination *to,
                                                  const struct address *source, enum rule passing)
{
    enum rule rule = refused_past(pod, terms, cookie, sk, to, passing);

    if (rule == RULE_NONE)
        return false;
    count(cookie, TOTAL_OUTBOUND_DENIED);
    emit_call(cookie, sk, to, source, DECIDED(rule, VERDICT_REFUSE), TOTAL_OUTBOUND_DENIED);
    return true;
}

/*
 * Refuses a connect() or sendmsg() with this errno, a negative number. Before Linux 6.1 a program can't say why it
 * refuses, and the caller sees EPERM. Returns what the program returns.
 */
static __always_inline int refuse_with(int number)
{
#ifdef SET_RETVAL
    bpf_set_retval(number);
#endif
    return 0;
}
