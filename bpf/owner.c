/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Who has opened a socket, as create.c stores it with the socket. If a socket is older than the programs, the process
 * that calls connect() or bind() counts as its opener.
 */

#define ALLOW 1
#define REFUSE 0

static __always_inline struct opener caller(void)
{
    __u64 ids = bpf_get_current_uid_gid();
    struct opener who = {.uid = ids, .gid = ids >> 32, .cgroup = bpf_get_current_cgroup_id()};

    return who;
}

static __always_inline struct opener opener_of(struct bpf_sock *sk)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

    return state && state->flags & SOCKET_OPENED ? state->opener : caller();
}

/*
 * Whether the socket was opened in the proxy's container. If the pod is not strict, the ids alone count, as in Istio.
 */
static __always_inline enum container container_of(const struct pod *pod, __u64 cookie, const struct opener *who)
{
    __u64 *container;

    if (!(pod->flags & POD_STRICT))
        return CONTAINER_TRUSTED;
    container = proxies.lookup(&cookie);
    if (!container)
        return CONTAINER_UNKNOWN;
    return *container == who->cgroup ? CONTAINER_TRUSTED : CONTAINER_OTHER;
}
