/* SPDX-License-Identifier: GPL-2.0 */
/* Looks up the facts for a decision in the maps: the pod's rules for ports and ranges, its addresses and interfaces. */

_Static_assert(TOTAL_OUTBOUND_REFUSED == (int)VERDICT_REFUSE, "verdicts are counted by their number");

/* Plain additions are enough: each CPU has sums of its own. */
static __always_inline void count(__u64 cookie, __u32 total)
{
    __u64 *sum = totals.lookup(&total);
    struct tally *tally = tallies.lookup(&cookie);

    if (sum)
        *sum += 1;
    if (tally && total < TOTALS)
        tally->connections[total] += 1;
}

static __always_inline __u32 rules_of_port(const struct pod *pod, __u64 cookie, __u16 port)
{
    struct port_key key = {.cookie = cookie, .port = port};
    __u32 *rules;

    if (!(pod->flags & POD_PORT_RULES))
        return 0;
    rules = port_rules.lookup(&key);
    return rules ? *rules : 0;
}

/* The first of a family's slots in `listeners`. Bit 3 tells the families apart, without a branch. */
static __always_inline __u32 first_slot(__u32 family)
{
    _Static_assert((AF_INET & 8) == 0 && (AF_INET6 & 8) == 8, "bit 3 is that of AF_INET6 alone");
    return (family >> 3 & 1) * FAMILY_SLOTS;
}

static __always_inline struct network_key host_key(__u64 cookie, const struct destination *to)
{
    struct network_key key = {
        .prefixlen = 64 + 32 + 128, .cookie = cookie, .family = to->family, .address = to->address};

    return key;
}

static __always_inline __u32 network_of(const struct pod *pod, __u64 cookie, const struct destination *to)
{
    struct network_key key = host_key(cookie, to);
    __u32 *verdict;

    if (!(pod->flags & POD_NETWORKS))
        return 0;
    verdict = networks.lookup(&key);
    return verdict ? *verdict : 0;
}

static __always_inline struct own_address *own_address(__u64 cookie, const struct address *address)
{
    struct address_key key = {.cookie = cookie, .address = *address};

    return addresses.lookup(&key);
}

static __always_inline bool is_own_address(__u64 cookie, const struct address *address)
{
    return own_address(cookie, address) != 0;
}

static __always_inline bool is_excluded_interface(const struct pod *pod, __u64 cookie, __u32 ifindex)
{
    struct interface_key key = {.cookie = cookie, .ifindex = ifindex};

    return pod->flags & POD_INTERFACES && interfaces.lookup(&key);
}

/*
 * Whether a connection leaves through an interface that the pod excludes. At connect() the kernel has not chosen a
 * route yet, so the agent keeps the routes of such pods in the map `routes`.
 */
static __always_inline bool leaves_excluded(const struct pod *pod, __u64 cookie, struct bpf_sock *sk,
                                            const struct destination *to, bool loopback)
{
    struct network_key key = host_key(cookie, to);
    __u32 ifindex = sk->bound_dev_if;
    struct route *route;

    if (!(pod->flags & POD_INTERFACES))
        return false;
    if (loopback)
        return is_excluded_interface(pod, cookie, LO_IFINDEX);
    if (ifindex)
        return is_excluded_interface(pod, cookie, ifindex);
    route = routes.lookup(&key);
    return route && is_excluded_interface(pod, cookie, route->ifindex);
}

/* The source address that the kernel would choose for the destination if it were not rewritten. */
static __always_inline struct address source_for(const struct pod *pod, __u64 cookie, struct destination *to)
{
    struct network_key key = host_key(cookie, to);
    struct own_address *own = own_address(cookie, &to->address);
    struct route *route;

    if (own)
        return own->source;
    if (pod->flags & POD_ROUTES) {
        route = routes.lookup(&key);
        if (route && !is_unspecified(&route->source))
            return route->source;
    }
    return to->family == AF_INET ? pod->source4 : pod->source6;
}

/*
 * Whether the pod denies the destination. This comes before all rules of capture. Loopback and the pod's own addresses
 * are never denied, because such connections do not leave the pod.
 */
static __always_inline bool is_denied_outbound(const struct pod *pod, __u64 cookie, struct destination *to)
{
    if (!(pod->flags & POD_DENIES) || is_on_lo(&to->address) || is_own_address(cookie, &to->address))
        return false;
    return rules_of_port(pod, cookie, swap16(to->port_be)) & PORT_DENY_OUTBOUND;
}

static __always_inline bool is_denied_inbound(const struct pod *pod, __u64 cookie, __u16 port)
{
    return pod->flags & POD_DENIES && rules_of_port(pod, cookie, port) & PORT_DENY_INBOUND;
}

/* Gathers the facts and decides. `source` is the address that the socket is bound to. */
static __always_inline struct decision decide(struct pod *pod, __u64 cookie, struct bpf_sock *sk,
                                              struct destination *to, const struct address *source, bool udp)
{
    struct opener who = opener_of(sk);
    struct outbound facts = {.port = swap16(to->port_be), .udp = udp, .mark = sk->mark};
    struct decision decision;

    facts.ports = rules_of_port(pod, cookie, facts.port);
    facts.network = network_of(pod, cookie, to);
    facts.first_loopback = is_first_loopback(&to->address);
    facts.loopback = is_on_lo(&to->address) || is_own_address(cookie, &to->address);
    facts.from_inbound = is_inbound_source(source);
    facts.excluded_interface = leaves_excluded(pod, cookie, sk, to, facts.loopback);
    facts.proxy_uid = who.uid == pod->proxy_uid;
    facts.proxy_gid = who.gid == pod->proxy_gid;
    facts.container = container_of(pod, cookie, &who);
    decision = decide_outbound(pod->flags, &facts);
    /* Early outbound: the user's init containers reach the network before the proxy has listened for the first time. */
    if ((decision.verdict == VERDICT_OUTBOUND || decision.verdict == VERDICT_DNS) && pod->flags & POD_EARLY_OUTBOUND
        && !started.lookup(&cookie))
        return DECIDED(RULE_EARLY, VERDICT_PASS);
    return decision;
}
