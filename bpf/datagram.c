/* SPDX-License-Identifier: GPL-2.0 */
/*
 * DNS capture for UDP sockets that name the nameserver with each datagram: cgroup/sendmsg4, sendmsg6, recvmsg4,
 * recvmsg6. connect.c captures the connected sockets; their replies pass through recvmsg here.
 *
 * A query goes to pilot-agent's resolver on loopback. Its reply must seem to come from the nameserver that was asked.
 * If a socket has asked several nameservers, nothing in a reply says which of them it answers for. So each nameserver
 * of a socket has a slot k from 0 to 3, and each slot but 0 has an alias, a source address of its own:
 *
 *   - sendmsg changes the source of a query for slot k to alias k.
 *   - The resolver replies to alias k. sendmsg changes the destination of this reply to the pod's address and its
 *     source to alias k.
 *   - recvmsg sees alias k as the source and replaces it by the nameserver in slot k.
 *
 * Conntrack tells such replies apart by ports. The nameservers are stored with the socket and go away with it.
 *
 * sendmsg returns 1 to allow and 0 to refuse (EPERM); recvmsg must return 1.
 */

/* Aliases 1–3: 127.53.0.k and, in the prefix that is local to every pod, ::53:0:k. */
#define ALIAS4 0x7f350000 /* host order */
#define ALIAS6_WORD2 swap32(0x00000053)

static __always_inline struct address alias_of(__u32 slot, __u32 family)
{
    struct address alias6 = {.word = {SPREAD6_WORD0, SPREAD6_WORD1, ALIAS6_WORD2, swap32(slot)}};

    return family == AF_INET ? address_of_ip4(swap32(ALIAS4 | slot)) : alias6;
}

/* The slot that an alias stands for; 0 if the address is no alias. */
static __always_inline __u32 slot_of_alias(const struct address *address)
{
    __u32 last = swap32(address->word[3]), slot;

    if (is_mapped(address))
        slot = last ^ ALIAS4;
    else if (is_spread6(address) && address->word[2] == ALIAS6_WORD2)
        slot = last;
    else
        return 0;
    return slot < NAMESERVER_SLOTS ? slot : 0;
}

static __always_inline bool is_same(const struct destination *a, const struct destination *b)
{
    return a->family == b->family && a->address.word[0] == b->address.word[0]
           && a->address.word[1] == b->address.word[1] && a->address.word[2] == b->address.word[2]
           && a->address.word[3] == b->address.word[3];
}

/* The slot of a nameserver. A new one takes the next free slot; if none is free, the last one. -1 if out of memory. */
static __always_inline int slot_of(struct bpf_sock *sk, const struct destination *to)
{
    struct nameservers *asked = resolvers.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    __u32 used;

    if (!asked)
        return -1;
    used = asked->used;
    for (int slot = 0; slot < NAMESERVER_SLOTS; slot++)
        if (slot < used && is_same(&asked->slot[slot], to))
            return slot;
    if (used < NAMESERVER_SLOTS)
        asked->used = used + 1;
    else
        used = NAMESERVER_SLOTS - 1;
    asked->slot[used] = *to;
    return used;
}

/*
 * The new source of a query: an alias, or the address that the query would have had without capture. All zero if the
 * source stays as it is.
 */
static __always_inline struct address source_of_query(const struct pod *pod, __u64 cookie, struct destination *to,
                                                      const struct address *bound, int slot)
{
    struct address keep = {};

    if (slot)
        return alias_of(slot, to->family);
    return is_unspecified(bound) && !is_on_lo(&to->address) ? source_for(pod, cookie, to) : keep;
}

/* Whether the resolver answers a query that was captured with an alias as source. */
static __always_inline bool is_reply_to_alias(struct bpf_sock *sk, const struct destination *to)
{
    return sk->src_port == RESOLVER_PORT && slot_of_alias(&to->address);
}

/*
 * Decides a datagram. The verdict is DNS for a captured query and for the resolver's reply to an alias. Then `to`
 * becomes the new destination and `source` the new source. If `source` is all zero, the datagram keeps its source.
 */
static __always_inline struct decision redirect(struct bpf_sock_addr *ctx, struct pod *pod, struct terms terms,
                                                __u64 cookie, struct bpf_sock *sk, struct destination *to,
                                                const struct address *bound, struct address *source)
{
    struct destination resolver = {};
    struct decision decision;
    int slot;

    if (is_reply_to_alias(sk, to)) {
        *source = to->address;
        to->address = to->family == AF_INET ? pod->source4 : pod->source6;
        return DECIDED(RULE_NONE, VERDICT_DNS);
    }
    if (to->port_be != swap16(DNS_PORT))
        return DECIDED(RULE_NONE, VERDICT_PASS);
    resolve_unspecified(to, bound);
    decision = decide(ctx, pod, terms, cookie, sk, to, bound, true);
    if (decision.verdict != VERDICT_DNS)
        return decision;
    slot = slot_of(sk, to);
    if (slot < 0)
        return DECIDED(decision.rule, VERDICT_REFUSE);
    *source = source_of_query(pod, cookie, to, bound, slot);
    rewritten_destination(to, VERDICT_DNS, &resolver);
    *to = resolver;
    return decision;
}

static __always_inline void write_source(struct bpf_sock_addr *ctx, __u32 family, const struct address *source)
{
    if (family == AF_INET) {
        ctx->msg_src_ip4 = source->word[3];
        return;
    }
    ctx->msg_src_ip6[0] = source->word[0];
    ctx->msg_src_ip6[1] = source->word[1];
    ctx->msg_src_ip6[2] = source->word[2];
    ctx->msg_src_ip6[3] = source->word[3];
}

/* sendmsg6 never gets a mapped address (::ffff:a.b.c.d): the kernel runs sendmsg4 for those. */
static __always_inline int capture_datagram(struct bpf_sock_addr *ctx, __u32 family)
{
    __u64 cookie = bpf_get_netns_cookie(ctx);
    struct pod *pod = pods.lookup(&cookie);
    struct destination to = {}, asked;
    struct address bound, source = {};
    struct bpf_sock *sk = ctx->sk;
    struct decision decision;
    struct terms terms;

    if (!pod || !sk)
        return ALLOW;
    terms = terms_of(pod);
    read_destination(ctx, family, &to);
    bound = ADDRESS_OF(sk, src, family);
    if (is_shadow(terms) && !is_reply_to_alias(sk, &to)) { /* queries from before are still answered */
        if (to.port_be == swap16(DNS_PORT)) {
            resolve_unspecified(&to, &bound);
            decision = DECIDED(RULE_NO_IPV6, VERDICT_PASS);
            if (family == AF_INET || terms.flags & POD_IPV6)
                decision = decide(ctx, pod, terms, cookie, sk, &to, &bound, true);
            watch_query(pod, cookie, sk, &to, &bound, decision);
        }
        return ALLOW;
    }
    if (is_refused_by_pod(pod, terms, cookie, sk, &to, &bound))
        return REFUSE;
    if (!(terms.flags & POD_DNS) || (family == AF_INET6 && !(terms.flags & POD_IPV6)))
        return is_refused_uncaptured(pod, terms, cookie, sk, &to, &bound, RULE_NONE) ? REFUSE : ALLOW;
    asked = to;
    decision = redirect(ctx, pod, terms, cookie, sk, &to, &bound, &source);
    if (decision.verdict == VERDICT_UNREACHABLE) {
        count(cookie, TOTAL_OUTBOUND_UNREACHABLE);
        emit_call(cookie, sk, &asked, &bound, decision, TOTAL_OUTBOUND_UNREACHABLE);
        return refuse_with(-(int)decision.error);
    }
    if (decision.verdict == VERDICT_PASS)
        return is_refused_uncaptured(pod, terms, cookie, sk, &to, &bound, decision.rule) ? REFUSE : ALLOW;
    if (decision.verdict != VERDICT_DNS) {
        note_refused(cookie, sk, &asked, decision.rule);
        return REFUSE;
    }
    count(cookie, TOTAL_DNS_CAPTURED);
    emit_call(cookie, sk, &asked, &bound, decision, TOTAL_DNS_CAPTURED);
    write_destination(ctx, family, &to);
    if (!is_unspecified(&source))
        write_source(ctx, family, &source);
    return ALLOW;
}

int ss_sendmsg4(struct bpf_sock_addr *ctx)
{
    return capture_datagram(ctx, AF_INET);
}

int ss_sendmsg6(struct bpf_sock_addr *ctx)
{
    return capture_datagram(ctx, AF_INET6);
}

/* The nameserver that a reply of the resolver should seem to come from; 0 if this socket has asked none. */
static __always_inline struct destination *nameserver_of(struct bpf_sock *sk, const struct address *from)
{
    struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);
    struct nameservers *asked;
    __u32 slot = slot_of_alias(from), index;

    if (!slot && !is_first_loopback(from))
        return 0;
    if (!slot && sk->state == BPF_TCP_ESTABLISHED && state && state->flags & SOCKET_CAPTURED)
        return &state->original;
    asked = resolvers.sk_storage_get(sk, 0, 0);
    index = FIELD(slot); /* read again: otherwise the compiler drops the check of the bound, which the verifier needs */
    return asked && index < NAMESERVER_SLOTS && index < asked->used ? &asked->slot[index] : 0;
}

static __always_inline int tell_nameserver(struct bpf_sock_addr *ctx, __u32 family)
{
    struct destination *nameserver;
    struct bpf_sock *sk = ctx->sk;
    struct destination from;

    if (!sk || ctx->user_port != swap16(RESOLVER_PORT))
        return ALLOW;
    read_destination(ctx, family, &from);
    nameserver = nameserver_of(sk, &from.address);
    if (nameserver)
        write_destination(ctx, family, nameserver);
    return ALLOW;
}

int ss_recvmsg4(struct bpf_sock_addr *ctx)
{
    return tell_nameserver(ctx, AF_INET);
}

int ss_recvmsg6(struct bpf_sock_addr *ctx)
{
    return tell_nameserver(ctx, AF_INET6);
}
