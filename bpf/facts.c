/* SPDX-License-Identifier: GPL-2.0 */
/* Looks up what a decision needs to know of a pod's ports, ranges and addresses. Shared by connect.c and lookup.c. */

static __always_inline __u32 rules_of_port(const struct pod *pod, __u64 cookie, __u16 port)
{
    struct port_key key = {.cookie = cookie, .port = port};
    __u32 *rules;

    if (!(pod->flags & POD_PORT_RULES))
        return 0;
    rules = port_rules.lookup(&key);
    return rules ? *rules : 0;
}

static __always_inline __u32 network_of(const struct pod *pod, __u64 cookie, const struct destination *to)
{
    struct network_key key = {
        .prefixlen = 64 + 32 + 128, .cookie = cookie, .family = to->family, .address = to->address};
    __u32 *verdict;

    if (!(pod->flags & POD_NETWORKS))
        return 0;
    verdict = networks.lookup(&key);
    return verdict ? *verdict : 0;
}

static __always_inline bool is_own_address(__u64 cookie, struct address *address)
{
    struct owner *owner = addresses.lookup(address);

    return owner && owner->cookie == cookie;
}
