/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every map and struct of the kernel half: who writes it, who reads it, how big, which byte order.
 *
 * The maps are sidestep's only state. The agent (cni/enroll.py) writes the policy ones at ADD and DEL; the programs
 * write the per-connection ones. layout.py mirrors the structs and a test compares the two field by field.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Fields ending in _be are in network order, all
 * others in host order. A pod is named by the cookie of its network namespace, which is never reused before a reboot.
 */
#ifndef SIDESTEP_MAPS_H
#define SIDESTEP_MAPS_H

/* Ports of Istio's sidecar: virtualOutbound, virtualInbound and the HBONE tunnel. */
#define OUTBOUND_PORT 15001
#define INBOUND_PORT 15006
#define TUNNEL_PORT 15008

/* Sizes: reaching one fails an ADD with a message that names the map (see bpf/tables.py), never silently. */
#define MAX_PODS 4096
#define MAX_ADDRESSES 16384
#define MAX_PORT_RULES 262144
#define MAX_NETWORKS 262144
#define MAX_LISTENERS 65536
#define MAX_HANDSHAKES 16384 /* connections between SYN-ACK and accept, node-wide */

/* Listening sockets remembered per pod and port: Envoy has one per worker, any of them serves the whole group. */
#define LISTENER_SLOTS 16

struct address {
    __be32 word[4];
};

/* pods[cookie].flags */
#define POD_IPV6 (1u << 0)              /* IPv6 is captured too (Istio: first address or ISTIO_DUAL_STACK) */
#define POD_OUTBOUND_ALL (1u << 1)      /* includeOutboundIPRanges "*" */
#define POD_INBOUND_ALL (1u << 2)       /* includeInboundPorts "*" */
#define POD_PORT_RULES (1u << 3)        /* the pod has entries in port_rules */
#define POD_NETWORKS (1u << 4)          /* the pod has entries in networks */
#define POD_LOOPBACK_INCLUDED (1u << 5) /* an included range starts in 127/8 or is ::1: rule O3b is left out */

/* One mesh pod: the decision's constants first, then who it is, so that maps can be matched with pods after a crash. */
struct pod {
    __u32 flags;
    __u32 proxy_uid; /* as the initial user namespace sees them */
    __u32 proxy_gid;
    __u32 addresses;          /* entries of this pod in addresses, port_rules and networks: CHECK compares them */
    __u32 port_rules;
    __u32 networks;
    struct address source4;   /* what captured connections are bound to, so that the proxy sees the pod's address; */
    struct address source6;   /* all zero when the pod has none of that family */
    char uid[64];             /* strings are NUL-terminated; lengths are those Kubernetes and CNI allow */
    char name[256];
    char namespace[64];
    char container_id[136];
    char network[128];
    char ifname[16];
};

/* port_rules flags, one entry per pod and port */
#define PORT_EXCLUDE_OUTBOUND (1u << 0)
#define PORT_INCLUDE_OUTBOUND (1u << 1)
#define PORT_EXCLUDE_INBOUND (1u << 2)
#define PORT_INCLUDE_INBOUND (1u << 3)

struct port_key {
    __u64 cookie;
    __u16 port;
    __u16 zero16;
    __u32 zero32;
};

/* networks verdicts: effective prefixes, so that the longest match already obeys "exclude beats include" */
#define NETWORK_EXCLUDED 1
#define NETWORK_INCLUDED 2

struct network_key {
    __u32 prefixlen; /* bits: 64 for the cookie, 32 for the family, then the prefix of the 16-byte address */
    __u64 cookie;
    __u32 family;    /* AF_INET or AF_INET6, so that ::/0 does not match IPv4 */
    struct address address;
} __attribute__((packed));

struct owner {
    __u64 cookie;
    __u32 ifindex; /* interface of the pod that has the address */
    __u32 zero32;
};

struct listener_key {
    __u64 cookie;
    __u16 port;
    __u16 slot;
    __u32 zero32;
};

/* A connection between its two ends' ESTABLISHED: what the connecting side knows and the accepting side needs. */
struct handshake_key {
    __u64 cookie;
    struct address client;
    struct address server;
    __u16 client_port;
    __u16 server_port;
    __u32 zero32;
};

struct destination {
    struct address address;
    __be16 port_be;
    __u16 family; /* AF_INET or AF_INET6: of the address, not of the socket */
    __u32 zero32;
};

/* sockets[].flags */
#define SOCKET_CAPTURED (1u << 0) /* connect() was rewritten: original is what the application asked for */
#define SOCKET_ACCEPTED (1u << 1) /* accepted by the proxy: original is what its peer asked for */
#define SOCKET_LISTENER (1u << 2) /* bound to a proxy port by the pod's proxy */

struct socket_state {
    struct destination original;
    __u32 flags;
    __u32 zero32;
};

/* What is attached, so that a second start can tell whether anything has to be done. */
struct build {
    __u8 sources[32]; /* SHA-256 of the joined program text */
    char cgroup[256]; /* where the links are attached, NUL-terminated */
};

/*
 * Settings are map values, never compile flags. TABLE(kind, key, value, name, size, flags) declares a map pinned as
 * <bpffs>/sidestep/v1/maps/<name>; the loader defines it, a C compiler checking the layout may define it away.
 */

/* agent → connect, getpeername, bind, sockops, sockopt, lookup; by netns cookie. Written last at ADD, removed first. */
TABLE("hash", __u64, struct pod, pods, MAX_PODS, NO_PREALLOC)

/* agent → lookup (whose packet is it?) and connect (does it leave through lo?); by the pod's own addresses */
TABLE("hash", struct address, struct owner, addresses, MAX_ADDRESSES, NO_PREALLOC)

/* agent → connect, lookup; include and exclude ports, by netns cookie and port */
TABLE("hash", struct port_key, __u32, port_rules, MAX_PORT_RULES, NO_PREALLOC)

/* agent → connect; include and exclude ranges, longest prefix within the cookie */
TABLE("lpm_trie", struct network_key, __u32, networks, MAX_NETWORKS, NO_PREALLOC)

/* sockops (listen) → lookup; the proxy's listening sockets; entries leave by themselves when a socket closes */
SOCKET_TABLE(struct listener_key, __u64, listeners, MAX_LISTENERS)

/* sockops (connecting side) → sockops (accepting side), which deletes it; least recently used go first */
TABLE("lru_hash", struct handshake_key, struct destination, handshakes, MAX_HANDSHAKES, 0)

/* connect, bind, sockops → getpeername, sockopt, sockops; freed with the socket, never evicted */
SOCKET_STORAGE(struct socket_state, sockets)

/* loader → loader of the next start */
TABLE("array", __u32, struct build, build, 1, 0)

#endif
