/* SPDX-License-Identifier: GPL-2.0 */
/*
 * cgroup/sock_create: stores with each socket of a pod who opened it, and notes the sockets whose packets no hook sees.
 *
 * Istio's rules match the credentials that a socket was opened with. So a socket that was opened before setuid(), or
 * passed to another process, keeps its first owner. The program runs for every socket() below the cgroup. It returns 1
 * to allow, and 0 to refuse (EPERM) what a pod with POD_UNCAPTURED_DENIED wants no socket for.
 */

int ss_sock_create(struct bpf_sock *sk)
{
    __u64 cookie = bpf_get_netns_cookie(sk);
    struct socket_state *state;
    struct opener who;
    struct pod *pod;

    if (sk->family != AF_INET && sk->family != AF_INET6)
        return ALLOW;
    pod = pods.lookup(&cookie);
    if (!pod)
        return ALLOW;
    who = caller();
    if (!is_shadow(terms_of(pod)) && !may_open(sk, pod, cookie, &who))
        return REFUSE;
    state = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (state) {
        state->opener = who;
        state->flags = SOCKET_OPENED;
    }
    return ALLOW;
}
