/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The addresses of a sock_addr hook's context: what a call asks for, what it is told, what its socket is bound to. Every
 * field is read and written by itself, as the verifier wants it. Shared by connect.c and datagram.c.
 */

static __always_inline void read_destination4(struct bpf_sock_addr *ctx, struct destination *to)
{
    to->address = address_of_ip4(ctx->user_ip4);
    to->port_be = ctx->user_port;
    to->family = AF_INET;
}

/* Java, .NET and Go dial IPv4 as ::ffff:a.b.c.d on an AF_INET6 socket: that is IPv4, and no connect4 will run. */
static __always_inline void read_destination6(struct bpf_sock_addr *ctx, struct destination *to)
{
    to->address.word[0] = ctx->user_ip6[0];
    to->address.word[1] = ctx->user_ip6[1];
    to->address.word[2] = ctx->user_ip6[2];
    to->address.word[3] = ctx->user_ip6[3];
    to->port_be = ctx->user_port;
    to->family = is_mapped(&to->address) ? AF_INET : AF_INET6;
}

static __always_inline void write_destination4(struct bpf_sock_addr *ctx, const struct destination *to)
{
    ctx->user_ip4 = to->address.word[3];
    ctx->user_port = to->port_be;
}

static __always_inline void write_destination6(struct bpf_sock_addr *ctx, const struct destination *to)
{
    ctx->user_ip6[0] = to->address.word[0];
    ctx->user_ip6[1] = to->address.word[1];
    ctx->user_ip6[2] = to->address.word[2];
    ctx->user_ip6[3] = to->address.word[3];
    ctx->user_port = to->port_be;
}

/* What an AF_INET6 socket is bound to. */
static __always_inline struct address bound_address6(struct bpf_sock *sk)
{
    struct address bound;

    bound.word[0] = sk->src_ip6[0];
    bound.word[1] = sk->src_ip6[1];
    bound.word[2] = sk->src_ip6[2];
    bound.word[3] = sk->src_ip6[3];
    return bound;
}
