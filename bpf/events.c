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
    if (!events.ringbuf_output(event, sizeof(*event), BPF_RB_NO_WAKEUP)) /* the reader looks by itself */
        return;
    sum = lost.lookup(&zero);
    if (sum)
        *sum += 1;
}
