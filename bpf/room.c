/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Whether there is memory for a redirected message: on the machine, and in the receiver's container. TCP merely waits
 * where memory is short. A redirected message that finds none is an error for its sender, and because the sender
 * charges it to the receiver's container, the kernel may kill the receiver for it.
 */

#ifdef ACCELERATION
/* Levels of cgroups that are looked at, from the container's upwards; kubelet's trees have four or five */
#define CGROUP_LEVELS 8
/* sk_memcg has flags in its low bits (SK_BPF_MEMCG_FLAG_MASK, include/net/sock.h) */
#define MEMCG_MASK (~7ULL)
/* At least this much of a cgroup's memory is left to others: a quarter, but no more pages than this (1 GiB) */
#define RESERVED_PAGES (1 << 18)
/* Of the memory that is there beyond that, one receiver's redirected bytes may take this part: a 256th */
#define SHARE_SHIFT 8
/* Page counters count pages. Some machines have larger ones than 4 KiB, and then more room than we believe */
#define COUNTER_PAGE_SHIFT 12

/*
 * Whether TCP on the machine holds as much memory as the first mark of tcp_mem. Beyond the second mark the kernel may
 * refuse memory for a redirected message. The sender then gets ENOMEM, and proxies break the connection. With TCP the
 * sender would merely wait.
 */
static __always_inline bool is_memory_short(const struct pairing *pairing)
{
    return (__s64)read64(pairing->allocated, 0) >= (__s64)read64(pairing->marks, 0);
}

#if defined(SOCK_MEMCG) && defined(MEMCG_MEMORY)
/* The counter that the kernel charges for a socket's memory: in cgroup version 1 TCP has one of its own. */
static __always_inline __u64 counter_of(__u64 memcg)
{
#ifdef MEMCG_TCPMEM
    __u8 has_own = 0;

    read_kernel(&has_own, sizeof(has_own), (void *)(memcg + MEMCG_TCPMEM_ACTIVE));
    if (has_own)
        return memcg + MEMCG_TCPMEM;
#endif
    return memcg + MEMCG_MEMORY;
}

/* Whether one cgroup has no room for `bytes` of a receiver. */
static __always_inline bool is_cgroup_short(__u64 counter, __u64 max, __u64 bytes)
{
    __u64 used = read64(counter, COUNTER_USAGE);
    __u64 reserved = max / 4 < RESERVED_PAGES ? max / 4 : RESERVED_PAGES;

    return used + reserved >= max || bytes >= (max - used - reserved) >> SHARE_SHIFT << COUNTER_PAGE_SHIFT;
}

/*
 * Whether the receiver's container, or a cgroup above it, is short of memory for the `bytes` that the receiver would
 * have unread. sk_memcg is 0 if nothing limits the socket.
 */
static __always_inline bool is_container_short(const struct pairing *pairing, __u64 bytes)
{
    __u64 memcg = read64(pairing->peer_socket, SOCK_MEMCG) & MEMCG_MASK;
    __u64 counter, max;

    if (!memcg)
        return false;
    counter = counter_of(memcg);
    for (int level = 0; level < CGROUP_LEVELS; level++) {
        max = read64(counter, COUNTER_MAX);
        if (is_cgroup_short(counter, max, bytes))
            return true;
        counter = read64(counter, COUNTER_PARENT);
        if (!counter)
            return false;
    }
    return false;
}
#else
static __always_inline bool is_container_short(const struct pairing *pairing, __u64 bytes)
{
    return false;
}
#endif
#endif
