/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Raw tracepoints signal_generate and sched_process_exit: which processes of enrolled pods a signal has killed, and
 * which process sent that signal. Only `sidestep trace` loads these programs, and they end with it.
 *
 * ss_signal stores the sender of each signal under the receiving process's id and the signal's number. ss_exit looks up
 * the signal that the process died of. So other signals, which the process handles or which come too late, do no harm.
 */

/* TRACE_SIGNAL_DELIVERED of trace/events/signal.h: the signal was delivered, not ignored, pending already or lost */
#define SIGNAL_DELIVERED 0

struct delivery {
    __u32 process;
    __u32 signal;
};

BPF_TABLE("lru_hash", struct delivery, __u32, senders, 1024);

static __always_inline __u64 cookie_of(__u64 task)
{
    __u64 namespaces = read64(task, TASK_NSPROXY);

    return namespaces ? read64(read64(namespaces, NSPROXY_NET), NET_COOKIE) : 0;
}

/* args: signal, info, receiving task, whether it is for the whole group, result (trace/events/signal.h) */
int ss_signal(struct bpf_raw_tracepoint_args *ctx)
{
    __u32 sender = bpf_get_current_pid_tgid() >> 32;
    struct delivery delivery = {};
    __u64 task = ctx->args[2];
    __u64 cookie;

    if ((int)ctx->args[4] != SIGNAL_DELIVERED)
        return 0;
    cookie = cookie_of(task);
    if (!pods.lookup(&cookie))
        return 0;
    delivery.process = read32(task, TASK_TGID);
    delivery.signal = ctx->args[0];
    senders.update(&delivery, &sender);
    return 0;
}

int ss_exit(struct bpf_raw_tracepoint_args *ctx)
{
    struct event event = {.kind = EVENT_KILLED};
    __u64 task = ctx->args[0];
    struct delivery delivery = {};
    __u32 *sender;

    event.signal = read32(task, TASK_EXIT_CODE) & 0x7f; /* wait(2) */
    event.pid = read32(task, TASK_TGID);
    if (!event.signal || event.pid != read32(task, TASK_PID))
        return 0;
    event.cookie = cookie_of(task);
    if (!pods.lookup(&event.cookie) || !is_traced(event.cookie))
        return 0;
    event.uid = bpf_get_current_uid_gid();
    read_kernel(event.command, sizeof(event.command), (void *)(task + TASK_COMM));
    delivery.process = event.pid;
    delivery.signal = event.signal;
    sender = senders.lookup(&delivery);
    if (sender)
        event.sender = *sender;
    senders.delete(&delivery);
    emit(&event);
    return 0;
}
