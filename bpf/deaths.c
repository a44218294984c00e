/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Raw tracepoints signal_generate and sched_process_exit, loaded by `sidestep trace` alone and gone with it: which
 * processes of enrolled pods a signal has killed, and who sent it. The two are joined by the process's id.
 */

struct sent {
    __u32 signal;
    __u32 sender;
};

BPF_TABLE("lru_hash", __u32, struct sent, signals, 1024);

static __always_inline __u64 cookie_of(__u64 task)
{
    __u64 namespaces = read64(task, TASK_NSPROXY);

    return namespaces ? read64(read64(namespaces, NSPROXY_NET), NET_COOKIE) : 0;
}

int ss_signal(struct bpf_raw_tracepoint_args *ctx)
{
    struct sent sent = {.signal = ctx->args[0], .sender = bpf_get_current_pid_tgid() >> 32};
    __u64 task = ctx->args[2];
    __u64 cookie = cookie_of(task);
    __u32 process;

    if (!pods.lookup(&cookie))
        return 0;
    process = read32(task, TASK_TGID);
    signals.update(&process, &sent);
    return 0;
}

int ss_exit(struct bpf_raw_tracepoint_args *ctx)
{
    struct event event = {.kind = EVENT_KILLED};
    __u64 task = ctx->args[0];
    struct sent *sent;
    __u32 process;

    event.signal = read32(task, TASK_EXIT_CODE) & 0x7f; /* wait(2) */
    process = read32(task, TASK_TGID);
    if (!event.signal || process != read32(task, TASK_PID))
        return 0;
    event.cookie = cookie_of(task);
    if (!pods.lookup(&event.cookie) || !is_traced(event.cookie))
        return 0;
    event.pid = process;
    event.uid = bpf_get_current_uid_gid();
    read_kernel(event.command, sizeof(event.command), (void *)(task + TASK_COMM));
    sent = signals.lookup(&process);
    if (sent && sent->signal == event.signal)
        event.sender = sent->sender;
    signals.delete(&process);
    emit(&event);
    return 0;
}
