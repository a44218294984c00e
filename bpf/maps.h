/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every map and struct of the kernel half: who writes it, who reads it, how big, which byte order.
 *
 * The maps are sidestep's only state. The agent (cni/enrolment/enroll.py) writes the policy ones at ADD and DEL; the programs
 * write the per-connection ones. layout.py mirrors the structs and a test compares the two field by field.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Fields ending in _be are in network order, all
 * others in host order. A pod is named by the cookie of its network namespace, which is never reused before a reboot.
 */
#ifndef SIDESTEP_MAPS_H
#define SIDESTEP_MAPS_H

/* Ports of Istio's sidecar: virtualOutbound, virtualInbound, the HBONE tunnel and pilot-agent's resolver. */
#define OUTBOUND_PORT 15001
#define INBOUND_PORT 15006
#define TUNNEL_PORT 15008
#define RESOLVER_PORT 15053
#define DNS_PORT 53
/* SO_MARK of the proxy's connections to the application in TPROXY mode (Envoy's original_src filter) */
#define TPROXY_MARK 1337

/*
 * Where captured connections are spread: 127.64.0.0/10, and a unique local prefix ("sidestep" in ASCII after the fd) that
 * the agent makes local to each pod. Nothing else may be there.
 */
#define SPREAD4 0x7f400000 /* host order */
#define SPREAD4_HOSTS 0x003fffff
#define SPREAD6_WORD0 __builtin_bswap32(0xfd736964)
#define SPREAD6_WORD1 __builtin_bswap32(0x65737465)

/* Sizes: reaching one fails an ADD with a message that names the map (see bpf/tables.py), never silently. */
#define MAX_PODS 4096
#define MAX_ADDRESSES 16384
#define MAX_PORT_RULES 262144
#define MAX_NETWORKS 262144
#define MAX_LISTENERS 65536
#define MAX_ROUTES 65536
#define MAX_INTERFACES 16384
#define MAX_HANDSHAKES 16384  /* connections between SYN-ACK and accept, node-wide */
#define MAX_DIALS 65536       /* connections of TPROXY proxies to their applications, node-wide */
#define MAX_ACCELERATED 65536 /* ends of accelerated connections, node-wide; others stay on TCP */
#define MAX_MEETINGS 65536    /* accelerated connections whose connecting end has not sent yet */

/* Listening sockets remembered per pod and port: Envoy has one per worker, any of them serves the whole group. */
#define LISTENER_SLOTS 16

/* Nameservers remembered per socket that asks several; resolv.conf names three at most (MAXNS) */
#define NAMESERVER_SLOTS 4

/* Interface index of lo in every namespace */
#define LO_IFINDEX 1

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
#define POD_INTERFACES (1u << 6)        /* the pod excludes interfaces */
#define POD_DNS (1u << 7)               /* DNS goes to the agent's resolver */
#define POD_TPROXY (1u << 8)            /* interceptionMode TPROXY */
#define POD_EARLY_OUTBOUND (1u << 9)    /* outbound passes until the proxy has listened for the first time */
#define POD_STRICT (1u << 10)           /* only the container in proxies counts as the proxy */
#define POD_DENIES (1u << 12)           /* the pod denies ports */
#define POD_ROUTES (1u << 11)           /* the pod has entries in routes: it excludes interfaces, or has several */

/* One mesh pod: the decision's constants first, then who it is, so that maps can be matched with pods after a crash. */
struct pod {
    __u32 flags;
    __u32 proxy_uid; /* as the initial user namespace sees them */
    __u32 proxy_gid;
    __u32 port_rules; /* entries of this pod in port_rules and networks: CHECK compares them */
    __u32 networks;
    __u32 acceleration;     /* enum level: the most this pod allows */
    struct address source4; /* what captured connections are bound to, so that the proxy sees the pod's address; */
    struct address source6; /* all zero when the pod has none of that family */
    char uid[64];           /* strings are NUL-terminated; lengths are those Kubernetes and CNI allow */
    char name[256];
    char namespace[64];
    char container_id[136];
    char network[128];
    char ifname[16];
    char excluded_interfaces[512]; /* names joined by commas: they may come later than the pod */
};

/* port_rules flags, one entry per pod and port */
#define PORT_EXCLUDE_OUTBOUND (1u << 0)
#define PORT_INCLUDE_OUTBOUND (1u << 1)
#define PORT_EXCLUDE_INBOUND (1u << 2)
#define PORT_INCLUDE_INBOUND (1u << 3)
#define PORT_DENY_OUTBOUND (1u << 4) /* these two may change while the pod runs */
#define PORT_DENY_INBOUND (1u << 5)

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
    __u32 family; /* AF_INET or AF_INET6, so that ::/0 does not match IPv4 */
    struct address address;
} __attribute__((packed));

struct owner {
    __u64 cookie;
    __u32 ifindex; /* interface of the pod that has the address */
    __u32 zero32;
    struct address source; /* what a connection of the pod to this address comes from */
};

/* Where packets for a prefix leave, and with which of the pod's addresses. */
struct route {
    __u32 ifindex;
    struct address source; /* all zero when not known */
};

/* interfaces of one pod that it excludes, by their index in its namespace */
struct interface_key {
    __u64 cookie;
    __u32 ifindex;
    __u32 zero32;
};

/* What connections of enrolled pods became; the first five are enum verdict (policy.h). */
enum total {
    TOTAL_OUTBOUND_DIRECT,
    TOTAL_OUTBOUND_CAPTURED,
    TOTAL_SELF_CAPTURED, /* the proxy calling its own pod: to its inbound listener */
    TOTAL_DNS_CAPTURED,
    TOTAL_OUTBOUND_REFUSED,
    TOTAL_INBOUND_DIRECT,
    TOTAL_INBOUND_CAPTURED,
    TOTAL_INBOUND_REFUSED, /* captured, but no proxy listens */
    TOTAL_OUTBOUND_DENIED, /* by the pod's own denied ports */
    TOTAL_INBOUND_DENIED,
    TOTALS,
};

/* The same of one pod alone. */
struct tally {
    __u64 connections[TOTALS];
};

struct listener_key {
    __u64 cookie;
    __u16 port;
    __u16 slot;
    __u32 zero32;
};

/* The two ends of a connection within one pod. */
struct connection_key {
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
#define SOCKET_OPENED (1u << 3)   /* opener is known: made by socket(), after the programs were attached */

/* Who opened a socket, as the initial user namespace sees the ids. */
struct opener {
    __u32 uid;
    __u32 gid;    /* primary group */
    __u64 cgroup; /* id of the cgroup2 directory of the container */
};

struct socket_state {
    struct destination original;
    struct opener opener;
    __u32 flags;
    __u32 zero32;
};

/* The nameservers that a UDP socket has asked; a reply's alias or connection tells which one it is from. */
struct nameservers {
    struct destination slot[NAMESERVER_SLOTS];
    __u32 used;
    __u32 zero32;
};

/*
 * How far connections within the node skip TCP's path. Each connection needs a level, and has it when its node, both pods
 * and the self-test allow as much.
 */
enum level {
    LEVEL_OFF,
    LEVEL_PROXY, /* between the proxies of two pods */
    LEVEL_FULL,  /* also between an application and its own proxy */
    LEVEL_NEVER, /* of a pairing that has not come about */
};

/*
 * One TCP connection from its beginning, as both of its ends see it. The first sequence numbers make sure that what meets
 * are the two ends of one connection, also where networks with equal addresses share a node.
 */
struct connection {
    struct address client;
    struct address server;
    __u16 client_port;
    __u16 server_port;
    __u32 client_sequence; /* of its first byte */
    __u32 server_sequence;
};

/* enum side */
#define SIDE_CLIENT 0
#define SIDE_SERVER 1

/* One end of a connection; client and server may be in one network namespace. */
struct end_key {
    __u64 cookie;
    struct connection connection;
    __u32 side;
};

/* The kernel's addresses of a connection's two sockets, from the first's establishment until the client knows both. */
struct meeting {
    __u64 cookie; /* of the client */
    __u64 client;
    __u64 server;   /* 0 until it has accepted */
    __u32 level;    /* what the connection needs */
    __u32 captured; /* whether the client is an application, captured on its way to its proxy */
};

/* What a socket that may be accelerated knows of its other end. */
struct pairing {
    struct end_key peer;
    __u64 own_socket;
    __u64 peer_socket; /* 0 until it is known */
    __u64 allocated;   /* where TCP counts the pages it holds, and where the marks of tcp_mem are */
    __u64 marks;
    __u32 level;     /* what the connection needs */
    __u32 small;     /* small messages in a row */
    __u8 to_proxy;   /* whether the other end is a proxy */
    __u8 has_passed; /* whether anything has gone by TCP in this direction */
    __u16 zero16;
    __u32 zero32;
};

/* What became of the messages that a pod's sockets have sent on accelerated connections. */
struct traffic {
    __u64 redirected;
    __u64 redirected_bytes;
    __u64 undrained;   /* passed to TCP: it had bytes under way, which must come first */
    __u64 over_budget; /* passed: the receiver is behind */
    __u64 no_peer;     /* passed: the other end is not in the map */
};

/* The node's settings that programs read. */
struct node {
    __u32 acceleration; /* enum level: the most that counts now */
    __u32 wanted;       /* enum level: the most that was asked for */
    char reason[248];   /* why it is less, or what is to be known of it, NUL-terminated */
};

/* Somebody reads events until a time of CLOCK_MONOTONIC in ns, 0 for nobody; of one pod, or of all (0). */
struct tracing {
    __u64 until;
    __u64 cookie;
};

/* struct event, kind */
enum event_kind {
    EVENT_CONNECT,   /* connect(), or a datagram, of TCP, UDP or DNS; destination is what was asked for */
    EVENT_INBOUND,   /* a SYN that arrives, or a datagram for a denied port */
    EVENT_LISTENING, /* the proxy listens on destination's port */
    EVENT_CLOSED,    /* and does not any more */
    EVENT_KILLED,    /* a process ends of a signal (deaths.c) */
};

/* Addresses of either family, ports in host order. */
struct event {
    __u64 time; /* CLOCK_MONOTONIC, ns */
    __u64 cookie;
    __u32 kind;
    __u32 verdict; /* enum total: what it is counted as */
    __u32 rule;    /* enum rule */
    __u32 protocol;
    __u32 pid; /* of the process that called; 0 where none did */
    __u32 uid; /* as the initial user namespace sees it: of the socket's opener */
    struct address source;
    struct address destination;
    __u16 source_port;
    __u16 destination_port;
    char command[16];
    __u32 signal;
    __u32 sender; /* process id of who sent it, 0 when that was not seen */
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

/* agent → every program; by netns cookie. Written last at ADD, removed first. */
TABLE("hash", __u64, struct pod, pods, MAX_PODS, NO_PREALLOC)

/* agent → lookup (whose packet is it?) and connect (does it leave through lo?); by the pod's own addresses */
TABLE("hash", struct address, struct owner, addresses, MAX_ADDRESSES, NO_PREALLOC)

/* agent → connect, lookup; include and exclude ports, by netns cookie and port */
TABLE("hash", struct port_key, __u32, port_rules, MAX_PORT_RULES, NO_PREALLOC)

/* agent → connect; include and exclude ranges, longest prefix within the cookie */
TABLE("lpm_trie", struct network_key, __u32, networks, MAX_NETWORKS, NO_PREALLOC)

/* agent → connect; the main routing table of pods with POD_ROUTES, longest prefix within the cookie */
TABLE("lpm_trie", struct network_key, struct route, routes, MAX_ROUTES, NO_PREALLOC)

/* agent → connect, lookup; excluded interfaces, the value says nothing */
TABLE("hash", struct interface_key, __u32, interfaces, MAX_INTERFACES, NO_PREALLOC)

/* agent → connect, bind; cgroup id of the proxy's container of pods with POD_STRICT, by netns cookie */
TABLE("hash", __u64, __u64, proxies, MAX_PODS, NO_PREALLOC)

/* sockops (listen) → connect; pods with POD_EARLY_OUTBOUND whose proxy has listened. The agent removes it with the pod */
TABLE("hash", __u64, __u32, started, MAX_PODS, NO_PREALLOC)

/* sockops (listen) → lookup; the proxy's listening sockets; entries leave by themselves when a socket closes */
SOCKET_TABLE(struct listener_key, __u64, listeners, MAX_LISTENERS)

/* sockops (connecting side) → sockops (accepting side), which deletes it; least recently used go first */
TABLE("lru_hash", struct connection_key, struct destination, handshakes, MAX_HANDSHAKES, 0)

/* sockops (connecting proxy) → lookup, TPROXY mode; deleted by sockops when the connection ends */
TABLE("lru_hash", struct connection_key, __u32, dials, MAX_DIALS, 0)

/* owner, connect, bind, sockops → connect, getpeername, sockopt, sockops; freed with the socket, never evicted */
SOCKET_STORAGE(struct socket_state, sockets)

/* sendmsg → recvmsg; only sockets that have asked a nameserver have one */
SOCKET_STORAGE(struct nameservers, resolvers)

/* sockops (establishment) → message; ends of connections within the node. Entries leave by themselves on close */
SOCKET_TABLE(struct end_key, __u64, accelerated, MAX_ACCELERATED)

/* sockops (client) → sockops (server) → message (client), which deletes it, or sockops when the client closes first */
TABLE("hash", struct connection, struct meeting, meetings, MAX_MEETINGS, NO_PREALLOC)

/* sockops → message; freed with the socket */
SOCKET_STORAGE(struct pairing, pairings)

/* message → agent, which makes an entry at ADD; by netns cookie, on each CPU by itself */
TABLE("percpu_hash", __u64, struct traffic, traffic, MAX_PODS, NO_PREALLOC)

/* agent → sockops, message; the one entry is 0 */
TABLE("array", __u32, struct node, node, 1, 0)

/* `sidestep trace` → whatever emits events; the one entry is 0 */
TABLE("array", __u32, struct tracing, tracing, 1, 0)

/* connect, datagram, lookup, sockops → `sidestep trace`; events for which the ring had no room, on each CPU by itself */
TABLE("percpu_array", __u32, __u64, lost, 1, 0)

/* connect, datagram, lookup, sockops → `sidestep trace`; bytes */
RING(events, 2 * 1024 * 1024)

/* connect, datagram, lookup → agent; how many connections became what, by enum total, on each CPU by itself */
TABLE("percpu_array", __u32, __u64, totals, TOTALS, 0)

/* connect, datagram, lookup → agent, which makes an entry at ADD; by netns cookie, on each CPU by itself */
TABLE("percpu_hash", __u64, struct tally, tallies, MAX_PODS, NO_PREALLOC)

/* loader → loader of the next start */
TABLE("array", __u32, struct build, build, 1, 0)

#endif
