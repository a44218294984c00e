/* SPDX-License-Identifier: GPL-2.0 */
/* Looks up the facts for a decision in the maps: the pod's rules for ports and ranges, its addresses and interfaces. */

_Static_assert(TOTAL_OUTBOUND_UNREACHABLE == (int)VERDICT_UNREACHABLE, "verdicts are counted by their number");

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

/* The flags of a pod and the number of its policy: all of the policy that is not in the rows of that number. */
struct terms {
    __u32 flags;
    __u16 policy;
};

/*
 * Reads both in one step, because the agent may put another policy in force at any time. A program reads them once and
 * then goes by these, so that a connection meets one policy and never parts of two.
 */
static __always_inline struct terms terms_of(const struct pod *pod)
{
    union {
        __u64 whole;
        struct terms terms;
    } read = {.whole = *(volatile __u64 *)pod};

    return read.terms;
}

/*
 * Whether the pod is only watched: it has Istio's rules, and netfilter captures. Connections that were captured before
 * the flag was set keep what was stored for them. The proxy's listeners are still registered, so that capture is
 * complete at the moment when the flag is removed.
 */
static __always_inline bool is_shadow(struct terms terms)
{
    return terms.flags & POD_SHADOW;
}

_Static_assert(__builtin_offsetof(struct pod, flags) == 0 && __builtin_offsetof(struct pod, policy) == 4,
               "terms_of() reads them as they are in struct pod");

static __always_inline __u32 rules_of_port(struct terms terms, __u64 cookie, __u16 port)
{
    struct port_key key = {.cookie = cookie, .port = port, .policy = terms.policy};
    __u32 *rules;

    if (!(terms.flags & POD_PORT_RULES))
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

static __always_inline struct network_key host_key(__u64 cookie, __u16 policy, const struct destination *to)
{
    struct network_key key = {
        .prefixlen = 64 + 32 + 128, .cookie = cookie, .family = to->family, .policy = policy, .address = to->address};

    return key;
}

static __always_inline __u32 network_of(struct terms terms, __u64 cookie, const struct destination *to)
{
    struct network_key key = host_key(cookie, terms.policy, to);
    __u32 *verdict;

    if (!(terms.flags & POD_NETWORKS))
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

/* What the pod's routes say about an address; 0 if the agent has put nothing about it into `routes`. */
static __always_inline struct route *route_to(const struct pod *pod, __u64 cookie, const struct address *address)
{
    struct destination to = {.address = *address, .family = is_mapped(address) ? AF_INET : AF_INET6};
    struct network_key key = host_key(cookie, 0, &to);

    return pod->flags & POD_ROUTES ? routes.lookup(&key) : 0;
}

static __always_inline bool is_through_lo(const struct route *route)
{
    return route && route->ifindex == LO_IFINDEX && !route->error;
}

/* Whether connections to an address, other than those of loopback, stay in the pod: it has it, or a local route to it. */
static __always_inline bool is_in_pod(const struct pod *pod, __u64 cookie, const struct address *address)
{
    return is_own_address(cookie, address) || is_through_lo(route_to(pod, cookie, address));
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
                                            const struct route *route, bool loopback)
{
    __u32 ifindex = sk->bound_dev_if;

    if (!(pod->flags & POD_INTERFACES))
        return false;
    if (loopback)
        return is_excluded_interface(pod, cookie, LO_IFINDEX);
    if (ifindex)
        return is_excluded_interface(pod, cookie, ifindex);
    return route && is_excluded_interface(pod, cookie, route->ifindex);
}

/*
 * The errno of the route to a destination, 0 if it may go on. A socket that is bound to a device or has a mark may be
 * routed in another way, so nothing is known. Whether UDP may broadcast is up to the socket.
 */
static __always_inline __u32 error_to(struct bpf_sock *sk, const struct route *route, bool udp)
{
    if (!route || sk->bound_dev_if || sk->mark || (udp && route->ifindex))
        return 0;
    return route->error;
}

/* The source address that the kernel would choose for the destination if it were not rewritten. */
static __always_inline struct address source_for(const struct pod *pod, __u64 cookie, struct destination *to)
{
    struct own_address *own = own_address(cookie, &to->address);
    struct route *route;

    if (own)
        return own->source;
    route = route_to(pod, cookie, &to->address);
    if (route && !is_unspecified(&route->source))
        return route->source;
    if (is_through_lo(route) && to->family == AF_INET)
        return to->address;
    return to->family == AF_INET ? pod->source4 : pod->source6;
}

/*
 * Whether the pod denies the destination. This comes before all rules of capture. Connections that do not leave the pod
 * are never denied.
 */
static __always_inline bool is_denied_outbound(const struct pod *pod, struct terms terms, __u64 cookie,
                                               struct destination *to)
{
    if (!(terms.flags & POD_DENIES) || is_on_lo(&to->address) || is_in_pod(pod, cookie, &to->address))
        return false;
    return rules_of_port(terms, cookie, swap16(to->port_be)) & PORT_DENY_OUTBOUND;
}

static __always_inline bool is_denied_inbound(struct terms terms, __u64 cookie, __u16 port)
{
    return terms.flags & POD_DENIES && rules_of_port(terms, cookie, port) & PORT_DENY_INBOUND;
}

/*
 * A value of which the verifier forgets what it knows. So it follows the rest of the program once, not once for each way
 * that the value came about: without this it would give up. `any` is a number that it does not know.
 */
static __always_inline __u32 blurred(__u32 value, __u32 any)
{
    __u32 mixed = value ^ any;

    asm volatile("" : "+r"(mixed)); /* else the compiler sees that nothing changes */
    return mixed ^ any;
}

#define IS(condition) (blurred(condition, facts->mark) & 1)

/*
 * Gathers the facts of an outbound connection. For an IPv6 address that is local by a route alone, the kernel chooses as
 * source what lo has: ::6. `source` is the address that the socket is bound to.
 */
static __always_inline void gather(struct pod *pod, struct terms terms, __u64 cookie, struct bpf_sock *sk,
                                   struct destination *to, const struct address *source, struct outbound *facts)
{
    struct opener who = opener_of(sk);
    struct route *route = route_to(pod, cookie, &to->address);

    facts->mark = sk->mark;
    facts->port = swap16(to->port_be);
    facts->ports = rules_of_port(terms, cookie, facts->port);
    facts->network = network_of(terms, cookie, to);
    to->family = blurred(to->family, facts->mark);
    facts->first_loopback = IS(is_first_loopback(&to->address));
    facts->loopback = IS(is_on_lo(&to->address) || is_own_address(cookie, &to->address) || is_through_lo(route));
    facts->route_error = blurred(error_to(sk, route, facts->udp), facts->mark);
    facts->multicast = IS(is_multicast(&to->address));
    facts->from_inbound = IS(is_inbound_source(source)
                             || (to->family == AF_INET6 && is_unspecified(source) && is_through_lo(route)
                                 && !is_own_address(cookie, &to->address)));
    facts->from_loopback = IS(is_mapped(source) && is_loopback(source) && !is_unspecified(source));
    facts->excluded_interface = IS(leaves_excluded(pod, cookie, sk, route, facts->loopback));
    facts->proxy_uid = IS(who.uid == pod->proxy_uid);
    facts->proxy_gid = IS(who.gid == pod->proxy_gid);
    facts->container = blurred(
        pod->flags & POD_AMBIENT ? container_of_ztunnel(pod, &who) : container_of(pod, cookie, &who), facts->mark);
}

/* Whether somebody in the pod listens on the proxy's outbound port now. Only a lookup knows. */
static __always_inline bool is_outbound_listening(struct bpf_sock_addr *ctx)
{
    struct bpf_sock_tuple four = {}, six = {};
    struct bpf_sock *sk;

    four.ipv4.saddr = four.ipv4.daddr = swap32(LOOPBACK4);
    four.ipv4.dport = swap16(OUTBOUND_PORT);
    six.ipv6.saddr[3] = six.ipv6.daddr[3] = swap32(1);
    six.ipv6.dport = swap16(OUTBOUND_PORT);
    /* Twice: if a packet interrupts the pod's own ss_steer, which runs in the lookup, the lookup finds nobody. */
    for (int look = 0; look < 2; look++) {
        sk = bpf_sk_lookup_tcp(ctx, &four, sizeof(four.ipv4), BPF_F_CURRENT_NETNS, 0);
        if (!sk)
            sk = bpf_sk_lookup_tcp(ctx, &six, sizeof(six.ipv6), BPF_F_CURRENT_NETNS, 0);
        if (sk) {
            bpf_sk_release(sk);
            return true;
        }
    }
    return false;
}

/*
 * Whether a connection that is captured passes all the same, because the pod's proxy has not come yet or has gone. A proxy
 * that has gone counts only when the Pod is being deleted. Before, it has crashed, and its pod is closed.
 */
static __always_inline enum rule rule_without_proxy(struct bpf_sock_addr *ctx, struct terms terms, __u64 cookie)
{
    __u32 ending = POD_LATE_OUTBOUND | POD_DELETED;
    bool has_started;

    if (!(terms.flags & (POD_EARLY_OUTBOUND | POD_LATE_OUTBOUND)))
        return RULE_NONE;
    has_started = started.lookup(&cookie) != 0;
    if (terms.flags & POD_EARLY_OUTBOUND && !has_started)
        return RULE_EARLY;
    if (has_started && (terms.flags & ending) == ending && !is_outbound_listening(ctx))
        return RULE_LATE;
    return RULE_NONE;
}

/* Gathers the facts and decides. */
static __always_inline struct decision decide(struct bpf_sock_addr *ctx, struct pod *pod, struct terms terms,
                                              __u64 cookie, struct bpf_sock *sk, struct destination *to,
                                              const struct address *source, bool udp)
{
    struct outbound facts = {.udp = udp};
    struct decision decision;
    enum rule without_proxy;

    gather(pod, terms, cookie, sk, to, source, &facts);
    decision =
        pod->flags & POD_AMBIENT ? decide_ambient_outbound(terms.flags, &facts) : decide_outbound(terms.flags, &facts);
    if (decision.verdict == VERDICT_OUTBOUND || decision.verdict == VERDICT_DNS) {
        without_proxy = rule_without_proxy(ctx, terms, cookie);
        if (without_proxy != RULE_NONE)
            decision = DECIDED(without_proxy, VERDICT_PASS);
    }
    decision = with_route(terms.flags, &facts, decision);
    decision.verdict = blurred(decision.verdict, facts.mark);
    return decision;
}
