/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reads and writes the address in a sock_addr hook's context: the destination that a call asks for, or the peer that a
 * call is told. Each field is read and written by itself, because the verifier refuses wider accesses. Shared by
 * connect.c and datagram.c.
 *
 * The programs for IPv4 and IPv6 sockets have one body. To the compiler `family` is a constant, so it leaves out the
 * branch of the other family.
 */

/* sockaddr_in and sockaddr_in6 (uapi/linux/in.h, in6.h). */
struct sockaddr4 {
    __u16 family;
    __be16 port_be;
    __be32 ip4;
    __u64 zero;
};

struct sockaddr6 {
    __u16 family;
    __be16 port_be;
    __be32 flowinfo;
    struct address address;
    __u32 scope;
};

/*
 * Java, .NET and Go connect to IPv4 addresses as ::ffff:a.b.c.d on an AF_INET6 socket. That is IPv4, although the
 * kernel runs connect6 for it, not connect4.
 */
static __always_inline __u16 family_of(const struct address *address)
{
    return is_mapped(address) ? AF_INET : AF_INET6;
}

static __always_inline void read_destination(struct bpf_sock_addr *ctx, __u32 family, struct destination *to)
{
    if (family == AF_INET) {
        to->address = address_of_ip4(ctx->user_ip4);
    } else {
        to->address.word[0] = ctx->user_ip6[0];
        to->address.word[1] = ctx->user_ip6[1];
        to->address.word[2] = ctx->user_ip6[2];
        to->address.word[3] = ctx->user_ip6[3];
    }
    to->port_be = ctx->user_port;
    to->family = family_of(&to->address);
}

static __always_inline void write_destination(struct bpf_sock_addr *ctx, __u32 family, const struct destination *to)
{
    if (family == AF_INET) {
        ctx->user_ip4 = to->address.word[3];
    } else {
        ctx->user_ip6[0] = to->address.word[0];
        ctx->user_ip6[1] = to->address.word[1];
        ctx->user_ip6[2] = to->address.word[2];
        ctx->user_ip6[3] = to->address.word[3];
    }
    ctx->user_port = to->port_be;
}
