/* SPDX-License-Identifier: GPL-2.0 */
/*
 * cgroup/post_bind4, post_bind6: marks sockets that the pod's proxy binds to a proxy port.
 *
 * Runs after a bind() has succeeded and always returns 1. Only marked sockets become inbound listeners (sockops.c), so
 * no captured connection goes to an application that listens on port 15006. If the pod is strict, sockops.c asks about
 * the container when the socket listens: the container may become known in between. Of ztunnel's
 * sockets it asks about the mark, which this program type can't read.
 */

static __always_inline int mark_listener(struct bpf_sock *sk)
{
    struct socket_state *state;
    struct opener who;
    __u64 cookie;
    struct pod *pod;

    if (sk->protocol != IPPROTO_TCP || (sk->src_port != INBOUND_PORT && sk->src_port != OUTBOUND_PORT))
        return ALLOW;
    cookie = bpf_get_netns_cookie(sk);
    pod = pods.lookup(&cookie);
    if (!pod)
        return ALLOW;
    who = opener_of(sk);
    if (pod->flags & POD_AMBIENT ? container_of_ztunnel(pod, &who) != CONTAINER_TRUSTED
                                 : who.uid != pod->proxy_uid && who.gid != pod->proxy_gid)
        return ALLOW;
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state) {
        state->opener = who;
        state->flags |= SOCKET_LISTENER;
    }
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
