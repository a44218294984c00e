/* SPDX-License-Identifier: GPL-2.0 */
/* 16-byte addresses in network order. IPv4 is written as ::ffff:a.b.c.d, so maps need only one shape of key. */
#ifndef SIDESTEP_ADDRESS_H
#define SIDESTEP_ADDRESS_H

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

#define LOOPBACK4 0x7f000001       /* 127.0.0.1, host order */
#define INBOUND_SOURCE4 0x7f000006 /* 127.0.0.6 (::6 in IPv6): Istio's inbound clusters and probes connect from it */

#define swap16(x) __builtin_bswap16(x)
#define swap32(x) __builtin_bswap32(x)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "sidestep is built for little-endian machines (x86-64, arm64)"
#endif
#define MAPPED_WORD swap32(0x0000ffff)

static __always_inline struct address address_of_ip4(__be32 ip4)
{
    struct address a = {.word = {0, 0, MAPPED_WORD, ip4}};
    return a;
}

/* Reads a context field at its own width: the verifier refuses reads that the compiler merged into a wider one. */
#define FIELD(lvalue) (*(volatile __typeof__(lvalue) *)&(lvalue))

static __always_inline struct address address_of_family(__u32 family, __be32 ip4, __be32 a, __be32 b, __be32 c,
                                                        __be32 d)
{
    struct address ip6 = {.word = {a, b, c, d}};

    return family == AF_INET ? address_of_ip4(ip4) : ip6;
}

/*
 * One end (src, dst, local, remote) of a packet or socket of either family. All fields are read before the family is
 * looked at; those of the other family are ignored. If each branch read its own, the compiler would merge the two reads
 * into one through a moved context pointer, which the verifier refuses.
 */
#define ADDRESS_OF(from, end, family) \
    address_of_family(family, FIELD((from)->end##_ip4), FIELD((from)->end##_ip6[0]), FIELD((from)->end##_ip6[1]), \
                      FIELD((from)->end##_ip6[2]), FIELD((from)->end##_ip6[3]))

static __always_inline bool is_mapped(const struct address *a)
{
    return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == MAPPED_WORD;
}

static __always_inline bool is_same_address(const struct address *a, const struct address *b)
{
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

/* 0.0.0.0, ::ffff:0.0.0.0 or :: */
static __always_inline bool is_unspecified(const struct address *a)
{
    return !(a->word[0] | a->word[1] | a->word[3]) && (a->word[2] == 0 || a->word[2] == MAPPED_WORD);
}

static __always_inline bool is_spread6(const struct address *a)
{
    return a->word[0] == SPREAD6_WORD0 && a->word[1] == SPREAD6_WORD1;
}

/* 127/8 or ::1, or the unspecified address, which the kernel connects to the namespace itself. */
static __always_inline bool is_loopback(const struct address *a)
{
    if (is_mapped(a))
        return a->word[3] == 0 || (a->word[3] & swap32(0xff000000)) == swap32(0x7f000000);
    return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 && (a->word[3] & ~swap32(1)) == 0;
}

/* exactly 127.0.0.1 or ::1, or the unspecified address */
static __always_inline bool is_first_loopback(const struct address *a)
{
    if (is_mapped(a))
        return a->word[3] == 0 || a->word[3] == swap32(LOOPBACK4);
    return is_loopback(a);
}

/* 224.0.0.0/4, ff00::/8, or 255.255.255.255: TCP never connects to these. */
static __always_inline bool is_multicast(const struct address *a)
{
    if (is_mapped(a))
        return a->word[3] == 0xffffffff || (a->word[3] & swap32(0xf0000000)) == swap32(0xe0000000);
    return (a->word[0] & swap32(0xff000000)) == swap32(0xff000000);
}

static __always_inline bool is_inbound_source(const struct address *a)
{
    if (is_mapped(a))
        return a->word[3] == swap32(INBOUND_SOURCE4);
    return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 && a->word[3] == swap32(6);
}

/* Loopback, or an address that the agent adds to each pod's lo (::6, SPREAD6) but not to the map `addresses`. */
static __always_inline bool is_on_lo(const struct address *to)
{
    return is_loopback(to) || is_inbound_source(to) || is_spread6(to);
}

/*
 * Replaces the unspecified address by the address that the kernel will use for it: the address that an IPv4 socket is
 * bound to, otherwise loopback.
 */
static __always_inline void resolve_unspecified(struct destination *to, const struct address *bound)
{
    if (!is_unspecified(&to->address))
        return;
    if (to->family == AF_INET)
        to->address = is_unspecified(bound) ? address_of_ip4(swap32(LOOPBACK4)) : *bound;
    else
        to->address = (struct address){.word = {0, 0, 0, swap32(1)}};
}

#endif
