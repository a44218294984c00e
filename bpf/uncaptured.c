/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Coverage: what leaves or reaches a pod past its proxy, and what is refused. Captured connections never get here.
 *
 * One entry of `uncaptured` stands for a remote address, a port and a protocol; it counts, and has the first and the last
 * time. A connection counts once; where a UDP socket names its peer with each datagram, each datagram counts. What stays
 * in the pod and what the proxy sends itself is not past the proxy, so it is not noted.
 *
 * A pod may have UNCAPTURED_PER_POD entries. The agent removes the oldest ones in time. If there is no room for a new
 * one, it is dropped and counted. The sums in `coverage` and `passages` stay right all the same.
 */

#define SOCK_RAW 3
#define IPPROTO_MPTCP 262
/* Ports of the sidecar itself beside the tunnel: pilot-agent's metrics and probes, its health, Envoy's metrics */
#define MERGED_METRICS_PORT 15020
#define HEALTH_PORT 15021
#define ENVOY_METRICS_PORT 15090

/* Who has called, as far as the kernel tells; all zero for a packet. */
struct caller_of_note {
    __u32 pid;
    __u32 uid;
    char command[16];
};

static __always_inline struct caller_of_note noted_caller(__u32 uid)
{
    struct caller_of_note by = {.uid = uid};

#ifdef CALLER
    by.pid = bpf_get_current_pid_tgid() >> 32;
    bpf_get_current_comm(by.command, sizeof(by.command));
#endif
    return by;
}

static __always_inline enum passage passage_of(const struct uncaptured_key *key)
{
    if (key->outcome == OUTCOME_REFUSED)
        return key->way == WAY_IN ? PASSAGE_IN_REFUSED : PASSAGE_OUT_REFUSED;
    if (key->way == WAY_IN)
        return key->protocol == IPPROTO_TCP ? PASSAGE_IN_TCP : PASSAGE_IN_UDP;
    if (key->way == WAY_SOCKET)
        return PASSAGE_OUT_OTHER;
    if (key->protocol == IPPROTO_TCP)
        return PASSAGE_OUT_TCP;
    return key->protocol == IPPROTO_UDP ? PASSAGE_OUT_UDP : PASSAGE_OUT_OTHER;
}

/* Whether an agent that has removed `gone` of the `added` entries of a pod leaves room for another one. */
static __always_inline bool has_room(__u64 added, const __u64 *gone, __u64 most)
{
    return gone && added - *gone < most;
}

/* A port that the sidecar itself answers on, for kubelet and Prometheus. */
static __always_inline bool is_sidecars_own(__u16 port)
{
    return port == MERGED_METRICS_PORT || port == HEALTH_PORT || port == ENVOY_METRICS_PORT;
}

/* A new entry, if the pod and the map have room. */
static __always_inline void begin_uncaptured(const struct uncaptured_key *key, const struct uncaptured *entry,
                                             struct coverage *sums)
{
    __u64 cookie = key->cookie;
    __u64 *gone = forgotten.lookup(&cookie);
    struct uncaptured *there;
    int refused;

    if (has_room(sums->added, gone, UNCAPTURED_PER_POD)) {
        refused = uncaptured.insert((struct uncaptured_key *)key, (struct uncaptured *)entry);
        if (!refused) {
            __sync_fetch_and_add(&sums->added, 1);
            return;
        }
        there = uncaptured.lookup((struct uncaptured_key *)key); /* another CPU may have been first */
        if (there) {
            __sync_fetch_and_add(&there->count, 1);
            return;
        }
    }
    __sync_fetch_and_add(&sums->dropped, 1);
}

/* Counts something in the pod's and the node's sums. */
static __always_inline void count_uncaptured(const struct uncaptured_key *key, struct coverage *sums)
{
    __u32 passage = passage_of(key), index;
    __u64 *sum = passages.lookup(&passage);

    if (sum)
        *sum += 1;
    index = FIELD(passage); /* read again, as in nameserver_of() */
    if (index < PASSAGES)
        __sync_fetch_and_add(&sums->passages[index], 1);
}

static __always_inline void note_uncaptured(struct uncaptured_key *key, __u32 rule, const struct caller_of_note *by)
{
    __u64 now = bpf_ktime_get_ns(), cookie = key->cookie;
    struct coverage *sums = coverage.lookup(&cookie);
    struct uncaptured fresh = {.count = 1, .first = now, .last = now, .rule = rule};
    struct uncaptured *entry;

    if (!sums)
        return;
    entry = uncaptured.lookup(key);
    count_uncaptured(key, sums);
    if (entry) {
        __sync_fetch_and_add(&entry->count, 1);
        entry->last = now;
        entry->rule = rule;
        return;
    }
    fresh.pid = by->pid;
    fresh.uid = by->uid;
    __builtin_memcpy(fresh.command, by->command, sizeof(fresh.command));
    begin_uncaptured(key, &fresh, sums);
}

/* Whether the pod's proxy, or ztunnel, has opened the socket with this mark. As long as nobody knows the container of a strict pod's, it has not. */
static __always_inline bool is_proxys(const struct pod *pod, __u64 cookie, __u32 mark, const struct opener *who)
{
    if (pod->flags & POD_AMBIENT)
        return is_ztunnels(pod, mark, who);
    return (who->uid == pod->proxy_uid || who->gid == pod->proxy_gid)
           && container_of(pod, cookie, who) == CONTAINER_TRUSTED;
}

/* The rule by which something passes that no rule of Istio's looks at, or that is looked at no further. */
static __always_inline enum rule rule_past(struct pod *pod, struct terms terms, __u64 cookie, struct bpf_sock *sk,
                                           const struct destination *to)
{
    struct route *route = route_to(pod, cookie, &to->address);

    if (leaves_excluded(pod, cookie, sk, route, false))
        return RULE_O0;
    if (rules_of_port(terms, cookie, swap16(to->port_be)) & PORT_EXCLUDE_OUTBOUND)
        return RULE_O1;
    if (network_of(terms, cookie, to) == NETWORK_EXCLUDED)
        return RULE_O8;
    if (sk->protocol == IPPROTO_UDP)
        return RULE_UDP;
    return sk->protocol == IPPROTO_TCP ? RULE_NO_IPV6 : RULE_PROTOCOL;
}

/* Whether an annotation asks for what this rule lets pass. */
static __always_inline bool is_asked_for(enum rule rule)
{
    return rule == RULE_O0 || rule == RULE_O1 || rule == RULE_O8 || rule == RULE_O11 || rule == RULE_EARLY
           || rule == RULE_LATE;
}

static __always_inline struct uncaptured_key key_to(__u64 cookie, struct bpf_sock *sk, const struct destination *to,
                                                    __u32 outcome)
{
    struct uncaptured_key key = {.cookie = cookie, .remote = to->address, .way = WAY_OUT, .outcome = outcome};

    key.port = swap16(to->port_be);
    key.protocol = sk->protocol;
    return key;
}

/* Notes a call that is refused. */
static __always_inline void note_refused(__u64 cookie, struct bpf_sock *sk, const struct destination *to, __u32 rule)
{
    struct uncaptured_key key = key_to(cookie, sk, to, OUTCOME_REFUSED);
    struct opener who = opener_of(sk);
    struct caller_of_note by = noted_caller(who.uid);

    note_uncaptured(&key, rule, &by);
}

/* Remembers a datagram, so that its answer is known for one. Most have been sent before, and a lookup is cheap. */
static __always_inline void remember_question(struct question_key *key)
{
    __u32 yes = 1;

    if (!questions.lookup(key))
        questions.update(key, &yes);
}

/* Whether a datagram goes to where the socket's port has got one from: it is a server's answer, whose question is listed. */
static __always_inline bool is_servers_answer(__u64 cookie, struct bpf_sock *sk, const struct destination *to)
{
    struct question_key key = {.cookie = cookie, .remote = to->address, .way = WAY_IN};

    key.port = sk->src_port;
    return questions.lookup(&key) != 0;
}

/*
 * Notes a call that is not captured, unless it is the proxy's, stays in the pod or answers a datagram. `rule` is the rule that let it pass,
 * RULE_NONE if none was asked. Returns the rule by which it is to be refused, because the pod wants nothing past its
 * proxy that no annotation asks for; RULE_NONE if it may go on.
 */
static __always_inline enum rule refused_past(struct pod *pod, struct terms terms, __u64 cookie, struct bpf_sock *sk,
                                              const struct destination *to, enum rule rule)
{
    struct question_key question = {.cookie = cookie, .remote = to->address, .way = WAY_OUT};
    struct opener who = opener_of(sk);
    struct uncaptured_key key;
    struct caller_of_note by;
    bool refused;

    if (is_on_lo(&to->address) || is_in_pod(pod, cookie, &to->address))
        return RULE_NONE;
    if (sk->protocol == IPPROTO_UDP) {
        if (is_servers_answer(cookie, sk, to))
            return RULE_NONE;
        question.port = swap16(to->port_be);
        remember_question(&question);
    }
    if (is_proxys(pod, cookie, sk->mark, &who))
        return RULE_NONE;
    if (rule == RULE_NONE)
        rule = rule_past(pod, terms, cookie, sk, to);
    refused = terms.flags & POD_UNCAPTURED_DENIED && !is_asked_for(rule);
    key = key_to(cookie, sk, to, refused ? OUTCOME_REFUSED : OUTCOME_PASSED);
    by = noted_caller(who.uid);
    note_uncaptured(&key, rule, &by);
    return refused ? rule : RULE_NONE;
}

/*
 * Notes a socket whose packets no hook sees one by one: raw ones, and protocols other than TCP and UDP. False if the pod
 * wants none.
 */
static __always_inline bool may_open(struct bpf_sock *sk, struct pod *pod, __u64 cookie, const struct opener *who)
{
    struct uncaptured_key key = {.cookie = cookie, .way = WAY_SOCKET, .outcome = OUTCOME_PASSED};
    __u32 type = sk->type, protocol = sk->protocol;
    struct caller_of_note by;

    if (type != SOCK_RAW && (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_MPTCP))
        return true;
    if (is_proxys(pod, cookie, sk->mark, who))
        return true;
    key.protocol = protocol;
    if (pod->flags & POD_UNCAPTURED_DENIED) {
        key.outcome = OUTCOME_REFUSED;
        count(cookie, TOTAL_OUTBOUND_DENIED);
    }
    by = noted_caller(who->uid);
    note_uncaptured(&key, RULE_PROTOCOL, &by);
    return key.outcome == OUTCOME_PASSED;
}

/* Whether a UDP datagram comes from where the pod or its proxy has sent one: an answer is no news. */
static __always_inline bool is_answer(__u64 cookie, const struct address *remote, __u16 remote_port)
{
    struct question_key key = {.cookie = cookie, .remote = *remote, .port = remote_port, .way = WAY_OUT};

    return questions.lookup(&key) != 0;
}

/* Notes a packet that reaches the application past the proxy, or is refused. Istio's own ports are the proxy's. */
static __always_inline void note_arrived(__u64 cookie, const struct address *remote, __u16 remote_port, __u16 port,
                                         __u32 protocol, __u32 rule, __u32 outcome)
{
    struct uncaptured_key key = {.cookie = cookie, .remote = *remote, .way = WAY_IN, .outcome = outcome};
    struct question_key question = {.cookie = cookie, .remote = *remote, .port = port, .way = WAY_IN};
    struct caller_of_note nobody = {};

    if (port == TUNNEL_PORT || is_sidecars_own(port))
        return;
    key.port = port;
    key.protocol = protocol;
    if (protocol == IPPROTO_UDP) {
        if (is_answer(cookie, remote, remote_port))
            return;
        if (outcome == OUTCOME_PASSED)
            remember_question(&question);
    }
    note_uncaptured(&key, rule, &nobody);
}
