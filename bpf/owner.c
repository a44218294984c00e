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

/* Whether a socket was opened in the container of one of the node's ztunnels, for pods in ambient mode. */
static __always_inline enum container container_of_ztunnel(const struct pod *pod, const struct opener *who)
{
    struct ztunnels *known;
    __u32 zero = 0;

    if (pod->flags & POD_TRUSTS_MARK)
        return CONTAINER_TRUSTED;
    known = ztunnels.lookup(&zero);
    if (!known || !known->cgroup[0])
        return CONTAINER_UNKNOWN;
    for (int slot = 0; slot < ZTUNNELS; slot++)
        if (known->cgroup[slot] == who->cgroup)
            return CONTAINER_TRUSTED;
    return CONTAINER_OTHER;
}

/* Whether ztunnel has opened a socket of a pod in ambient mode: by its mark and by its opener. */
static __always_inline bool is_ztunnels(const struct pod *pod, __u32 mark, const struct opener *who)
{
    mark &= MARK_BITS;
    return (mark == ZTUNNEL_MARK || mark == ORIGINAL_SOURCE_MARK)
           && container_of_ztunnel(pod, who) == CONTAINER_TRUSTED;
}
