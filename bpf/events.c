/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Writes events for `sidestep trace` while it runs. No program waits for the reader: if the ring has no room, the event
 * is lost and counted in `lost`. The reader renews its interest in `tracing`; without that, events soon stop. So a
 * killed reader costs nothing for long.
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
    if (!events.ringbuf_output(event, sizeof(*event), BPF_RB_NO_WAKEUP)) /* the reader polls */
        return;
    sum = lost.lookup(&zero);
    if (sum)
        *sum += 1;
}
