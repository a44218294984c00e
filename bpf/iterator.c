/* SPDX-License-Identifier: GPL-2.0 */
/*
 * iter/tcp: looks at the listening sockets of one network namespace, whatever process has them.
 *
 * The agent runs it in a pod's namespace, for sockets that the other programs have not seen begin to listen. It tells the
 * agent about each listener on a proxy port. It stores those that the agent has chosen in `listeners`: the agent chooses
 * what it was told the time before. It runs once for each TCP socket of the namespace. If the kernel does not take this
 * program, the agent copies the sockets from the processes that have them (cni/netns/listeners.py).
 */
#ifdef ITERATOR

/* struct bpf_iter_meta and struct bpf_iter__tcp (kernel/bpf/bpf_iter.c, net/ipv4/tcp_ipv4.c) */
struct iteration_meta {
    void *seq;
};

struct iteration {
    struct iteration_meta *meta;
    void *sk;
};

/* bpf_get_socket_cookie, called by its number: BCC's declaration of it cuts the cookie to 32 bits. */
static __u64 (*const cookie_of)(void *sk) = (void *)46;

/*
 * The user and group that the socket was opened with, as Istio's rules match them, and its cgroup. chown() changes none
 * of these. A socket of the kernel's own has no file, so it is nobody's.
 */
static __always_inline bool read_opener(struct opener *who, __u64 sk)
{
    __u64 file = read64(read64(sk, SOCK_SOCKET), SOCKET_FILE);
    __u64 credentials = read64(file, FILE_CREDENTIALS);

    if (!credentials)
        return false;
    who->uid = read32(credentials, CREDENTIALS_UID);
    who->gid = read32(credentials, CREDENTIALS_GID);
    who->cgroup = read64(read64(read64(sk, SOCK_CGROUP + CGROUP_OF_SOCK), CGROUP_NODE), NODE_ID);
    return true;
}

/*
 * Whether the kernel runs this program as the socket's owner. Before commit 9378096e8a65 (Linux 6.5 and 6.1.42) it holds
 * the socket's spinlock instead. To store the socket there would wait for that lock for ever. So on such a kernel nothing
 * is stored, which the agent notices (cni/enrolment/hearing.py).
 */
static __always_inline bool is_owned(void *sk)
{
    return read32((__u64)sk, SOCK_OWNED);
}

static __always_inline void store_chosen(void *sk, __u64 socket)
{
    struct listener_key key = {.port = INBOUND_PORT};
    struct choice *choice;
    __u32 zero = 0;

    choice = choices.lookup(&zero);
    if (!choice || !is_owned(sk))
        return;
    key.cookie = choice->cookie;
    for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
        key.slot = slot;
        if (choice->socket[slot] == socket)
            listeners.insert(&key, sk);
    }
}

int bpf_iter__tcp(struct iteration *ctx)
{
    struct found_listener found = {};
    void *sk = ctx->sk; /* read once: the verifier wants this very pointer to be checked */
    __u64 from = (__u64)sk;
    __u8 state = 0;

    if (!sk)
        return 0;
    read_kernel(&state, sizeof(state), sk + SOCK_STATE);
    read_kernel(&found.port, sizeof(found.port), sk + SOCK_PORT);
    if (state != BPF_TCP_LISTEN || (found.port != INBOUND_PORT && found.port != OUTBOUND_PORT))
        return 0;
    read_kernel(&found.family, sizeof(found.family), sk + SOCK_FAMILY);
    if (found.family == AF_INET6)
        read_kernel(&found.local, sizeof(found.local), sk + SOCK_LOCAL6);
    else
        found.local = address_of_ip4(read32(from, SOCK_LOCAL4));
    if (!read_opener(&found.opener, from))
        return 0;
    found.mark = read32(from, SOCK_MARK);
    found.socket = cookie_of(sk);
    bpf_seq_write(ctx->meta->seq, &found, sizeof(found));
    if (found.port == INBOUND_PORT)
        store_chosen(sk, found.socket);
    return 0;
}

#endif
