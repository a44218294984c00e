/* SPDX-License-Identifier: GPL-2.0 */
/*
 * cgroup/post_bind4, post_bind6: marks sockets that the pod's proxy binds to a proxy port.
 *
 * Runs after a bind() has succeeded, in the caller's context, which is where the owner is known. Only marked sockets
 * become inbound listeners (sockops.c), so an application on port 15006 gets nobody's traffic. Always returns 1.
 */

static __always_inline int mark_listener(struct bpf_sock *sk)
{
    __u64 cookie, ids;
    struct socket_state *state;
    struct pod *pod;

    if (sk->protocol != IPPROTO_TCP || (sk->src_port != INBOUND_PORT && sk->src_port != OUTBOUND_PORT))
        return ALLOW;
    cookie = bpf_get_netns_cookie(sk);
    pod = pods.lookup(&cookie);
    if (!pod)
        return ALLOW;
    ids = bpf_get_current_uid_gid();
    if ((__u32)ids != pod->proxy_uid && (__u32)(ids >> 32) != pod->proxy_gid)
        return ALLOW;
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state)
        state->flags |= SOCKET_LISTENER;
    return ALLOW;
}

int ss_post_bind4(struct bpf_sock *sk)
{
    return mark_listener(sk);
}

int ss_post_bind6(struct bpf_sock *sk)
{
    return mark_listener(sk);
}
