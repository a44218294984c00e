/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Every map and struct of the kernel half: who writes it, who reads it, how big, which byte order.
 *
 * The maps are sidestep's only state. The agent (cni/enrolment/enroll.py) writes the policy maps at ADD and DEL. The
 * programs write the per-connection maps. layout.py mirrors the structs, and a test compares the two field by field.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Fields ending in _be are in network order, all
 * others in host order. A pod is identified by the cookie of its network namespace, which the kernel never uses again
 * before a reboot.
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
 * SO_MARK of every socket of ztunnel's in a pod in ambient mode, and of its connections to the application that have the
 * client's address as source. Istio compares these bits only.
 */
#define ZTUNNEL_MARK 0x539
#define ORIGINAL_SOURCE_MARK 0x111
#define MARK_BITS 0xfff

/*
 * Captured connections are spread over these addresses: 127.64.0.0/10, and a unique local IPv6 prefix (fd, then
 * "sidestep" in ASCII) that the agent makes local to each pod. Nothing else may use them.
 */
#define SPREAD4 0x7f400000 /* host order */
#define SPREAD4_HOSTS 0x003fffff
#define SPREAD6_WORD0 __builtin_bswap32(0xfd736964)
#define SPREAD6_WORD1 __builtin_bswap32(0x65737465)

/*
 * Sizes of the maps. If a map that the agent writes is full, the ADD fails with a message that names the map
 * (bpf/tables.py).
 */
#define MAX_PODS 4096
#define MAX_ADDRESSES 131072
#define MAX_PORT_RULES 262144
#define MAX_NETWORKS 262144
#define MAX_LISTENERS 65536
#define MAX_ROUTES 131072
#define MAX_INTERFACES 16384
#define MAX_HANDSHAKES 16384  /* connections between SYN and accept, node-wide */
#define MAX_ARRIVALS 16384    /* connections between SYN and establishment, node-wide */
#define MAX_DIALS 65536       /* connections of TPROXY proxies and of ztunnels to applications, node-wide */
#define MAX_ACCELERATED 65536 /* ends of accelerated connections, node-wide; if it is full, connections stay on TCP */
#define MAX_MEETINGS 65536    /* accelerated connections whose connecting end has not sent yet */
#define MAX_QUESTIONS 16384  /* peers of UDP sockets that are not connected; a full map drops the least recently used */
#define MAX_UNCAPTURED 65536 /* entries of all pods; 0.1 KiB each, if they are there */
#define MAX_FLOWS 65536      /* as above; 0.2 KiB each */
#define MAX_SHADOWS 65536    /* connections of shadow pods that the agent has not compared yet; 0.1 KiB each */
#define MAX_FINDINGS 16384   /* kinds of differences, of all pods; 0.1 KiB each */

/* Entries of `uncaptured` and `flows` that one pod may have. The agent removes old ones before so many are there. */
#define UNCAPTURED_PER_POD 512
#define FLOWS_PER_POD 512

/*
 * Listening sockets stored per pod and port: the slots of IPv4, then those of IPv6. Envoy has a socket for each worker
 * and family. They are one SO_REUSEPORT group, and any one of them serves its whole group: the kernel chooses within the
 * group after bpf_sk_assign(). So a few slots are enough. A ztunnel has one socket. The last slot of a family has the socket that began to listen
 * most recently, so both a proxy that is being replaced and its successor have a socket here.
 */
#define FAMILY_SLOTS 2
#define LISTENER_SLOTS (2 * FAMILY_SLOTS)

/* Nameservers stored per UDP socket. resolv.conf names three at most (MAXNS). */
#define NAMESERVER_SLOTS 4

/* Interface index of lo in every namespace */
#define LO_IFINDEX 1

struct address {
    __be32 word[4];
};

/* pods[cookie].flags */
#define POD_IPV6 (1u << 0)                /* IPv6 is captured too (Istio: first address or ISTIO_DUAL_STACK) */
#define POD_OUTBOUND_ALL (1u << 1)        /* includeOutboundIPRanges "*" */
#define POD_INBOUND_ALL (1u << 2)         /* includeInboundPorts "*" */
#define POD_PORT_RULES (1u << 3)          /* the pod has entries in port_rules */
#define POD_NETWORKS (1u << 4)            /* the pod has entries in networks */
#define POD_LOOPBACK_INCLUDED (1u << 5)   /* an included range starts in 127/8 or is ::1, so rule O3b does not apply */
#define POD_INTERFACES (1u << 6)          /* the pod excludes interfaces */
#define POD_DNS (1u << 7)                 /* DNS goes to the agent's resolver */
#define POD_TPROXY (1u << 8)              /* interceptionMode TPROXY */
#define POD_EARLY_OUTBOUND (1u << 9)      /* outbound passes until the proxy has listened for the first time */
#define POD_STRICT (1u << 10)             /* only the container in proxies counts as the proxy */
#define POD_DENIES (1u << 12)             /* the pod denies ports */
#define POD_ROUTES (1u << 11)             /* the pod has entries in routes */
#define POD_LOOPBACK_STAYS (1u << 13)     /* the kernel refuses to send from 127/8 to the outside (no route_localnet) */
#define POD_UNCAPTURED_DENIED (1u << 14)  /* nothing leaves past the proxy that no annotation asks for */
#define POD_UNCAPTURED_AUDITED (1u << 15) /* the same is reported; no program reads this flag */
#define POD_LIVE_POLICY (1u << 16)        /* the policy follows the running Pod's annotations; no program reads this */
#define POD_LATE_OUTBOUND (1u << 17)  /* outbound passes once the Pod is being deleted and its proxy listens no more */
#define POD_DELETED (1u << 18)        /* the Pod is being deleted: its containers are ending */
#define POD_SHADOW (1u << 19)         /* the programs decide, but change, refuse and count nothing that is new */
#define POD_AMBIENT (1u << 20)        /* no proxy of its own: the node's ztunnel has sockets in the pod */
#define POD_BYPASS_INBOUND (1u << 21) /* ambient: inbound plaintext goes to the application (Istio's ingress mode) */
#define POD_TRUSTS_MARK (1u << 22)    /* ambient: ztunnel's mark is enough, whoever has opened the socket */

/*
 * One mesh pod: first what the decision needs, then the pod's identity, which a restarted agent reads. A policy is the
 * flags and the rows of port_rules and networks that carry its number. The programs read flags and number in one step
 * (terms_of()). So when the agent has written the rows of another policy, one update of this entry puts it in force as a
 * whole. The rows of the old one stay until no program can be at work with them.
 */
struct pod {
    __u32 flags;
    __u16 policy;
    __u16 zero16;
    __u32 proxy_uid; /* as the initial user namespace sees them */
    __u32 proxy_gid;
    __u32 port_rules; /* how many entries the pod has in port_rules, and below in networks: CHECK compares both */
    __u32 networks;
    __u32 acceleration;     /* enum level: the highest that this pod allows */
    struct address source4; /* captured connections are bound to these, so that the proxy sees the pod's address; */
    struct address source6; /* all zero if the pod has no address of that family */
    char uid[64];           /* strings are NUL-terminated; the lengths are those that Kubernetes and CNI allow */
    char name[256];
    char namespace[64];
    char container_id[136];
    char network[128];
    char ifname[16];
    char excluded_interfaces[512]; /* names joined by commas; an interface may appear later than the pod */
};

/* port_rules flags, one entry per pod and port */
#define PORT_EXCLUDE_OUTBOUND (1u << 0)
#define PORT_INCLUDE_OUTBOUND (1u << 1)
#define PORT_EXCLUDE_INBOUND (1u << 2)
#define PORT_INCLUDE_INBOUND (1u << 3)
#define PORT_DENY_OUTBOUND (1u << 4)
#define PORT_DENY_INBOUND (1u << 5)

struct port_key {
    __u64 cookie;
    __u16 port;
    __u16 policy;
    __u32 zero32;
};

/* networks verdicts. The agent computes the prefixes so that the longest match obeys "exclude beats include". */
#define NETWORK_EXCLUDED 1
#define NETWORK_INCLUDED 2

struct network_key {
    __u32 prefixlen; /* bits: 64 for the cookie, 32 for family and policy, then the prefix of the 16-byte address */
    __u64 cookie;
    __u16 family; /* AF_INET or AF_INET6, so that ::/0 does not match IPv4 */
    __u16 policy; /* 0 in routes */
    struct address address;
} __attribute__((packed));

/* An address that one pod has. Other pods of the node may have the same address. */
struct address_key {
    __u64 cookie;
    struct address address;
};

struct own_address {
    __u32 ifindex;         /* the pod's interface that has the address */
    struct address source; /* the source address of a connection from the pod to this address */
};

/*
 * What the kernel does with packets for a prefix. 0.0.0.0/0 or ::/0 with ENETUNREACH stands for all that the pod has no
 * route to. It is there only if the agent knows all routes of that family.
 */
struct route {
    __u32 ifindex; /* of the interface by which they leave; lo if they stay in the pod; 0 if nowhere */
    __u32 error;   /* errno of a connect() to there, 0 if it may go on; with an ifindex, of TCP's alone (broadcast) */
    struct address source; /* the pod's address that they have as source; all zero if not known */
};

/* uapi/asm-generic/errno-base.h and errno.h */
#define EINVAL 22
#define ENETUNREACH 101

/* An interface that a pod excludes, by its index in the pod's namespace. */
struct interface_key {
    __u64 cookie;
    __u32 ifindex;
    __u32 zero32;
};

/* Outcomes of connections of enrolled pods. The first six have the numbers of enum verdict (policy.h). */
enum total {
    TOTAL_OUTBOUND_DIRECT,
    TOTAL_OUTBOUND_CAPTURED,
    TOTAL_SELF_CAPTURED, /* the proxy called its own pod and was sent to its own inbound listener */
    TOTAL_DNS_CAPTURED,
    TOTAL_OUTBOUND_REFUSED,
    TOTAL_OUTBOUND_UNREACHABLE, /* the kernel would have refused it: no route */
    TOTAL_INBOUND_DIRECT,
    TOTAL_INBOUND_CAPTURED,
    TOTAL_INBOUND_REFUSED, /* captured, but no proxy listens */
    TOTAL_OUTBOUND_DENIED, /* the pod denies the port */
    TOTAL_INBOUND_DENIED,
    TOTALS,
};

/* One pod's connections by outcome: the index is enum total. */
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
    __u16 family; /* AF_INET or AF_INET6: the family of the address, not of the socket */
    __u32 zero32;
};

/* sockets[].flags */
#define SOCKET_CAPTURED (1u << 0) /* connect() was rewritten; `original` is the destination the application asked for */
#define SOCKET_ACCEPTED (1u << 1) /* the proxy accepted it; `original` is the destination its peer asked for */
#define SOCKET_LISTENER (1u << 2) /* bound to a proxy port by `opener`, who has the proxy's user or group */
#define SOCKET_OPENED (1u << 3)   /* `opener` is valid: the programs were attached when socket() made the socket */
#define SOCKET_KUBELETS (1u << 4) /* kubelet connects with it */

/* The process that opened a socket. The ids are those of the initial user namespace. */
struct opener {
    __u32 uid;
    __u32 gid;    /* primary group */
    __u64 cgroup; /* id of the cgroup2 directory of the container */
};

/* The cgroups of the node's ztunnels: 0 in unused slots, which come last. There are several while one is replaced. */
#define ZTUNNELS 8
struct ztunnels {
    __u64 cgroup[ZTUNNELS]; /* id of the cgroup2 directory of the container */
};

/* Where kubelet is: the id of its own cgroup2 directory, and the cookie of its network namespace. All zero if unknown. */
struct kubelet {
    __u64 cgroup;
    __u64 netns;
};

/* A listener on a proxy port that the iterator has found (iterator.c); `socket` is the socket's cookie. */
struct found_listener {
    __u64 socket;
    struct opener opener;
    struct address local;
    __u16 family;
    __u16 port;
    __u32 mark; /* SO_MARK */
};

/* What the iterator is to store: the netns cookie of the pod, and the cookie of the socket for each slot, 0 for none. */
struct choice {
    __u64 cookie;
    __u64 socket[LISTENER_SLOTS];
};

struct socket_state {
    struct destination original;
    struct opener opener;
    __u32 flags;
    __u32 proxy_port; /* the port of the proxy that the verdict chose, if SOCKET_CAPTURED */
};

/*
 * The nameservers that a UDP socket has asked. A reply's alias says which of them it comes from (datagram.c). The
 * nameserver of a connected socket is not here but in socket_state.
 */
struct nameservers {
    struct destination slot[NAMESERVER_SLOTS];
    __u32 used; /* slots in use */
    __u32 zero32;
};

/*
 * How far acceleration goes. Each connection needs a level. It is accelerated if the node's level and the levels of
 * both pods are at least that high. The node's level is never higher than the self-test allows.
 */
enum level {
    LEVEL_OFF,
    LEVEL_PROXY, /* between the proxies of two pods */
    LEVEL_FULL,  /* also between an application and its own proxy */
    LEVEL_NEVER, /* of a pairing that is incomplete or was declined by the other end: higher than any node's level */
};

/*
 * One TCP connection, described in the same way by both of its ends. The first sequence numbers make sure that only the
 * two ends of one connection meet, even if networks with equal addresses share a node.
 */
struct connection {
    struct address client;
    struct address server;
    __u16 client_port;
    __u16 server_port;
    __u32 client_sequence; /* of the client's first byte */
    __u32 server_sequence; /* of the server's first byte */
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

/*
 * Tells the two ends of a connection about each other. The connecting end writes it when established. At its
 * first message, the connecting end learns of the other end and deletes the entry.
 */
struct meeting {
    __u64 cookie;   /* the client's, until the server has accepted; then the server's */
    __u64 client;   /* address of the client's socket in the kernel */
    __u64 server;   /* address of the server's socket in the kernel; 0 until the server has accepted */
    __u32 level;    /* the level that the connection needs */
    __u32 captured; /* 1 if the client is an application that was captured on its way to its proxy */
};

/* What a socket that may be accelerated knows about its other end. */
struct pairing {
    struct end_key peer;
    __u64 own_socket;  /* address of this socket in the kernel */
    __u64 peer_socket; /* address of the other end's socket in the kernel; 0 until it is known */
    __u64 allocated;   /* addresses of TCP's count of the pages it holds, and of the three marks of tcp_mem */
    __u64 marks;
    __u32 level;   /* the level that the connection needs */
    __u32 small;   /* how many small messages were sent in a row */
    __u8 to_proxy; /* 1 if the other end is a proxy */
    __u8 zero8;
    __u16 zero16;
    __u32 redirected; /* bytes that were redirected in this direction; not counted further than matters (message.c) */
};

/* Messages that a pod's sockets have sent on accelerated connections. Whatever is not redirected goes by TCP. */
struct traffic {
    __u64 redirected;
    __u64 redirected_bytes;
    __u64 undrained;   /* went by TCP: TCP had bytes under way, which must come first */
    __u64 over_budget; /* went by TCP: the receiver is behind, or the node is short of memory for sockets */
    __u64 no_peer;     /* went by TCP: the other end is not in the map */
};

/* struct uncaptured_key, way and outcome */
#define WAY_OUT 0
#define WAY_IN 1
#define WAY_SOCKET 2 /* a socket was opened whose packets no hook sees; remote and port are 0 */
#define OUTCOME_PASSED 0
#define OUTCOME_REFUSED 1

/* What went past a pod's proxy or was refused: where to or from. */
struct uncaptured_key {
    __u64 cookie;
    struct address remote;
    __u16 port;    /* of the remote end; the pod's own for WAY_IN */
    __u8 protocol; /* IPPROTO_* */
    __u8 way;
    __u32 outcome;
};

/*
 * A datagram that was not answered yet, as far as anybody knows: `way` is WAY_OUT for one of the pod's or its proxy's,
 * WAY_IN for one that has arrived. The port is that of whoever was asked: an answer comes from there.
 */
struct question_key {
    __u64 cookie;
    struct address remote;
    __u16 port;
    __u16 way;
    __u32 zero32;
};

/* Times are CLOCK_MONOTONIC, ns. The process is the one that was first; all 0 for WAY_IN. */
struct uncaptured {
    __u64 count;
    __u64 first;
    __u64 last;
    __u32 rule; /* enum rule, of the last one */
    __u32 pid;
    __u32 uid; /* as the initial user namespace sees it */
    __u32 zero32;
    char command[16];
};

/* What is counted of those: of the node in `passages`, of each pod in `coverage`. layout.py has the names in this order. */
enum passage {
    PASSAGE_OUT_TCP,
    PASSAGE_OUT_UDP,
    PASSAGE_OUT_OTHER, /* also a socket that was opened */
    PASSAGE_IN_TCP,
    PASSAGE_IN_UDP,
    PASSAGE_OUT_REFUSED,
    PASSAGE_IN_REFUSED,
    PASSAGES,
};

struct coverage {
    __u64 passages[PASSAGES];
    __u64 added;   /* entries that were ever made */
    __u64 dropped; /* that found no room: each time one comes that has no entry */
};

/* struct flow_key, way */
#define FLOW_CAPTURED 0 /* an application's connection that its proxy has got; remote is the original destination */
#define FLOW_DIRECT 1   /* an application's connection that was not captured */
#define FLOW_INBOUND 2  /* a connection from outside of the pod; port is the pod's own, remote is all zero */

/* Connections of one pod that are counted together. */
struct flow_key {
    __u64 cookie;
    struct address remote;
    __u16 port;
    __u16 way;
    __u32 zero32;
};

/* Sums of connections that have closed. Bytes are those of applications: neither SYN nor FIN is among them. */
struct flow {
    __u64 connections;
    __u64 sent;        /* bytes that the other end has acknowledged */
    __u64 received;    /* bytes */
    __u64 retransmits; /* segments that were sent again */
    __u64 rtt;         /* smoothed round trip times, µs: of each connection as it was at its end, */
    __u64 timed;       /* of so many connections */
    __u64 duration;    /* from established to closed, ns */
    __u64 last;        /* when one has closed last, CLOCK_MONOTONIC in ns */
};

/* What is stored with the socket of a connection that is counted: where it is added when it closes. */
struct counted {
    struct flow_key key;
    __u64 since;    /* when it was established, CLOCK_MONOTONIC in ns; 0 once it has been added */
    __u64 received; /* the bytes received when the other end had acknowledged our FIN */
};

/* All of a pod's, and how its entries of `flows` came and did not. */
struct flow_sums {
    struct flow outbound;
    struct flow inbound;
    __u64 added;   /* entries that were ever made */
    __u64 dropped; /* connections that found no room for an entry */
};

/* Lifetimes of connections are counted by these bounds (flows.c); the last count has no bound. */
#define LIFETIMES 9

/*
 * A connection of a shadow pod, or a query over UDP, as its packets have it when the record is made: outbound before
 * netfilter has seen the first packet, inbound after. Whoever connects or asks is the client. `way` is WAY_OUT or WAY_IN.
 */
struct shadow_key {
    __u64 cookie;
    struct address client;
    struct address server;
    __u16 client_port;
    __u16 server_port;
    __u16 protocol;
    __u16 way;
};

/* What the programs would have done with it. `time` is CLOCK_MONOTONIC, ns; the process is all 0 for WAY_IN. */
struct shadow {
    __u64 time;
    __u32 verdict; /* enum verdict */
    __u32 rule;    /* enum rule */
    __u32 pid;
    __u32 uid; /* as the initial user namespace sees it */
    char command[16];
};

struct shadow_counts {
    __u64 unnamed; /* queries' sockets that are connected: nobody tells the programs their ports */
    __u64 dropped; /* what found no room in `shadows` */
};

/* Why the agent could not compare something. layout.py has the names in this order. */
enum uncompared {
    UNCOMPARED_NO_ENTRY, /* conntrack knows nothing of it, or not any more */
    UNCOMPARED_TPROXY,   /* TPROXY leaves no trace in conntrack */
    UNCOMPARED_UNSEEN,   /* the pod's namespace or its conntrack could not be looked at */
    UNCOMPARED_UNNAMED,  /* from shadow_counts */
    UNCOMPARED_DROPPED,  /* from shadow_counts */
    UNCOMPARED,
};

/* What the agent has compared of one pod. Times are CLOCK_MONOTONIC, ns. */
struct shadow_sums {
    __u64 since; /* when the pod became a shadow */
    __u64 last;  /* when something was last compared */
    __u64 same;
    __u64 different;
    __u64 not_compared[UNCOMPARED];
};

/* One kind of difference: `remote` and `port` as in struct uncaptured_key. */
struct finding_key {
    __u64 cookie;
    struct address remote;
    __u16 port;
    __u8 protocol;
    __u8 way;
    __u16 verdict; /* enum verdict: what the programs would have done, */
    __u16 rule;    /* and the rule */
    __u16 went_to; /* the port that netfilter redirected it to, 0 if it did not */
    __u16 zero16;
    __u32 zero32;
};

/* As in struct uncaptured: the process is the first one. */
struct finding {
    __u64 count;
    __u64 first;
    __u64 last;
    __u32 pid;
    __u32 uid;
    char command[16];
};

/* The node's settings that programs read. */
struct node {
    __u32 acceleration; /* enum level: the node's level now */
    __u32 wanted;       /* enum level: the level that was asked for */
    char reason[248];   /* why the level is lower than that, or what applications notice at it; NUL-terminated */
};

/* The interest of a reader of events (events.c). */
struct tracing {
    __u64 until;  /* when the interest ends, CLOCK_MONOTONIC in ns; 0 if nobody reads */
    __u64 cookie; /* the one pod of interest, 0 for all pods */
};

/* struct event, kind */
enum event_kind {
    EVENT_CONNECT,   /* a connect(), or a datagram that is captured or denied; destination is the one asked for */
    EVENT_INBOUND,   /* a SYN that arrives, or a datagram for a denied port */
    EVENT_LISTENING, /* the proxy begins to listen on the destination's port */
    EVENT_CLOSED,    /* the proxy no longer listens on it */
    EVENT_KILLED,    /* a signal has ended a process (deaths.c) */
};

/* Addresses are of either family, ports in host order. */
struct event {
    __u64 time; /* CLOCK_MONOTONIC, ns */
    __u64 cookie;
    __u32 kind;
    __u32 verdict; /* enum total: the total that counts it */
    __u32 rule;    /* enum rule */
    __u32 protocol;
    __u32 pid; /* of the calling or killed process; 0 if there is none */
    __u32 uid; /* of the socket's opener or the killed process, as the initial user namespace sees it */
    struct address source;
    struct address destination;
    __u16 source_port;
    __u16 destination_port;
    char command[16]; /* name of the calling or killed process */
    __u32 signal;
    __u32 sender; /* id of the process that sent the signal, 0 if unknown */
    __u32 zero32;
};

/* The attached programs and where. A later start compares it to tell whether it has anything to do. */
struct build {
    __u8 sources[32];  /* SHA-256 of the joined program text and of the extras that were left out on purpose */
    char cgroup[256];  /* where the links are attached, NUL-terminated */
    char lacking[128]; /* names of the extras (extras.py) that the programs do without, with commas, NUL-terminated */
};

/* What ss_steer has in the place of its pod's cookie until it is loaded for a pod: "sidestep". */
#define COOKIE_MARK 0x7369646573746570

/* Room for ss_steer: eight bytes an instruction, and the maps that it refers to */
#define STEERING_INSTRUCTIONS 256
#define STEERING_MAPS 4

/* ss_steer as it is compiled; its references to maps are indices into names. */
struct steering {
    __u32 instructions; /* how many there are */
    __u32 maps;
    char name[STEERING_MAPS][16]; /* NUL-terminated */
    __u64 code[STEERING_INSTRUCTIONS];
};

/* Which packet a pod's ss_steer passes on, and whose the pod is (lookup.c). */
struct steered {
    __u64 cookie;
    __u32 remote; /* last four bytes of the packet's source address */
    __u16 remote_port;
    __u16 local_port;
};

/*
 * Settings are map values, never compile flags. TABLE(kind, key, value, name, size, flags) declares a map that is
 * pinned as <bpffs>/sidestep/<layout>/maps/<name>. compiler.py defines the macro; tests of the layout define it as nothing.
 *
 * The arrow of each comment goes from the writer to the readers; programs are named by their file or hook.
 */

/* agent → every program; by netns cookie. At ADD the agent writes it last, at DEL it removes it first. */
TABLE("hash", __u64, struct pod, pods, MAX_PODS, NO_PREALLOC)

/*
 * agent → connect and datagram (does it leave through lo?), lookup (does it come from the pod itself?), sockops; by
 * netns cookie and address
 */
TABLE("hash", struct address_key, struct own_address, addresses, MAX_ADDRESSES, NO_PREALLOC)

/* agent → connect, datagram, lookup, sockops; rules of single ports, by netns cookie and port; PORT_* flags */
TABLE("hash", struct port_key, __u32, port_rules, MAX_PORT_RULES, NO_PREALLOC)

/* agent → connect, datagram; include and exclude ranges, longest prefix within the cookie */
TABLE("lpm_trie", struct network_key, __u32, networks, MAX_NETWORKS, NO_PREALLOC)

/*
 * agent → connect, datagram, sockops; the routes of pods with POD_ROUTES, longest prefix within the cookie: those of the
 * main table if the pod excludes interfaces or has several, those that lead elsewhere than out, and what is nested in both
 */
TABLE("lpm_trie", struct network_key, struct route, routes, MAX_ROUTES, NO_PREALLOC)

/* agent → connect, datagram, lookup; excluded interfaces; the value has no meaning */
TABLE("hash", struct interface_key, __u32, interfaces, MAX_INTERFACES, NO_PREALLOC)

/* agent → connect, datagram, sockops; by netns cookie: cgroup id of the proxy's container, if POD_STRICT */
TABLE("hash", __u64, __u64, proxies, MAX_PODS, NO_PREALLOC)

/* agent → connect, datagram, bind, sockops, for pods with POD_AMBIENT; key 0 is the only entry */
TABLE("array", __u32, struct ztunnels, ztunnels, 1, 0)

/* agent → connect, sockops, lookup; key 0 is the only entry */
TABLE("array", __u32, struct kubelet, kubelet, 1, 0)

/*
 * sockops (listen) → connect, datagram; by netns cookie: pods with POD_EARLY_OUTBOUND or POD_LATE_OUTBOUND whose proxy
 * has listened. The agent removes the entry with the pod.
 */
TABLE("hash", __u64, __u32, started, MAX_PODS, NO_PREALLOC)

/*
 * sockops (listen), iterator, agent → lookup, agent; the proxy's listening sockets. The kernel removes an entry when its
 * socket closes.
 */
SOCKET_TABLE(struct listener_key, __u64, listeners, MAX_LISTENERS)

/* sockops (connecting end) → sockops (accepting end), which deletes it. A full map drops the least recently used. */
TABLE("lru_hash", struct connection_key, struct destination, handshakes, MAX_HANDSHAKES, 0)

/* sockops (a TPROXY proxy, ztunnel or kubelet connects to the application) → lookup; sockops deletes it when the connection ends */
TABLE("lru_hash", struct connection_key, __u32, dials, MAX_DIALS, 0)

/* owner, connect, bind, sockops → connect, datagram, bind, sockopt, sockops; freed with the socket, never evicted */
SOCKET_STORAGE(struct socket_state, sockets)

/* sendmsg → sendmsg, recvmsg; only sockets that have asked a nameserver have one */
SOCKET_STORAGE(struct nameservers, resolvers)

/* sockops (establishment) → message; ends of connections within the node. The kernel removes an entry on close. */
SOCKET_TABLE(struct end_key, __u64, accelerated, MAX_ACCELERATED)

/* sockops (client) → sockops (server) → message (client), which deletes it; if the client closes first, sockops does */
TABLE("hash", struct connection, struct meeting, meetings, MAX_MEETINGS, NO_PREALLOC)

/* lookup (the server's pod has got a SYN) → sockops (the client is established), which deletes it; the server's netns cookie */
TABLE("lru_hash", struct connection_key, __u64, arrivals, MAX_ARRIVALS, 0)

/* sockops → message; freed with the socket */
SOCKET_STORAGE(struct pairing, pairings)

/* message → agent, which makes an entry of zeroes at ADD; by netns cookie; each CPU counts for itself */
TABLE("percpu_hash", __u64, struct traffic, traffic, MAX_PODS, NO_PREALLOC)

/* agent, `sidestep accelerate` → sockops, message; key 0 is the only entry */
TABLE("array", __u32, struct node, node, 1, 0)

/* `sidestep trace` → every program that emits events; key 0 is the only entry */
TABLE("array", __u32, struct tracing, tracing, 1, 0)

/* every program that emits events → `sidestep trace`; how many did not fit into the ring; each CPU counts for itself */
TABLE("percpu_array", __u32, __u64, lost, 1, 0)

/* connect, datagram, lookup, sockops, deaths → `sidestep trace`; struct event; the size is in bytes */
RING(events, 2 * 1024 * 1024)

/* connect, datagram, lookup → agent; the node's connections by enum total; each CPU counts for itself */
TABLE("percpu_array", __u32, __u64, totals, TOTALS, 0)

/* connect, datagram, lookup → agent, which makes an entry of zeroes at ADD; by netns cookie; per CPU as above */
TABLE("percpu_hash", __u64, struct tally, tallies, MAX_PODS, NO_PREALLOC)

/* attachment.py → attachment.py at the next start; key 0 is the only entry */
TABLE("array", __u32, struct build, build, 1, 0)

/* compiler → agent, which loads an instance of ss_steer for each pod; the one entry is 0 */
TABLE("hash", __u32, struct steering, steering, 1, NO_PREALLOC)

/* lookup (a pod's ss_steer) → lookup (ss_sk_lookup); each CPU has its own; key 0 is the only entry */
TABLE("percpu_array", __u32, struct steered, steered, 1, 0)

/* attachment.py → lookup (ss_steer calls it); the one entry is ss_sk_lookup */
TABLE("prog", __u32, __u32, inbound, 1, 0)

/*
 * sockops (accepting end) → agent, which makes an entry of zero at ADD; by netns cookie, per CPU as above: captured
 * connections that reached the proxy without their original destination
 */
TABLE("percpu_hash", __u64, __u64, lost_handovers, MAX_PODS, NO_PREALLOC)

/* connect, datagram, owner, lookup → agent, which removes the oldest of a pod and all of one that has gone */
TABLE("hash", struct uncaptured_key, struct uncaptured, uncaptured, MAX_UNCAPTURED, NO_PREALLOC)

/* connect, datagram, lookup → the same; tells answers from what is new. The value has no meaning */
TABLE("lru_hash", struct question_key, __u32, questions, MAX_QUESTIONS, 0)

/* the same programs → agent, which makes an entry of zeroes at ADD; by netns cookie */
TABLE("hash", __u64, struct coverage, coverage, MAX_PODS, NO_PREALLOC)

/* agent → the same programs; by netns cookie: how many entries of `uncaptured` the agent has removed */
TABLE("hash", __u64, __u64, forgotten, MAX_PODS, NO_PREALLOC)

/* the same programs → agent; of the node, by enum passage; each CPU counts for itself */
TABLE("percpu_array", __u32, __u64, passages, PASSAGES, 0)

/* sockops (establishment) → sockops (close), `sidestep flows`; freed with the socket */
SOCKET_STORAGE(struct counted, counted)

/* sockops (close) → agent, which removes the oldest of a pod and all of one that has gone; connections by pod and whom */
TABLE("hash", struct flow_key, struct flow, flows, MAX_FLOWS, NO_PREALLOC)

/* sockops (close) → agent, which makes an entry of zeroes at ADD; by netns cookie */
TABLE("hash", __u64, struct flow_sums, flow_sums, MAX_PODS, NO_PREALLOC)

/* agent → sockops (close); by netns cookie: how many entries of `flows` the agent has removed */
TABLE("hash", __u64, __u64, flows_forgotten, MAX_PODS, NO_PREALLOC)

/* sockops (close) → agent; of the node: 0 outbound, 1 inbound; each CPU counts for itself; `last` is not kept */
TABLE("percpu_array", __u32, struct flow, flow_totals, 2, 0)

/* sockops (close) → agent; of the node: connections by how long they were open; each CPU counts for itself */
TABLE("percpu_array", __u32, __u64, lifetimes, LIFETIMES, 0)

/* sockops (connecting), sendmsg, lookup → agent, which removes it: what shadow pods do */
TABLE("hash", struct shadow_key, struct shadow, shadows, MAX_SHADOWS, NO_PREALLOC)

/* connect → sockops (connecting), which removes it; freed with the socket */
SOCKET_STORAGE(struct shadow, shadowed)

/*
 * the same programs → agent, which makes an entry of zeroes for each shadow pod that it compares; by netns cookie. Of
 * pods without one nothing is recorded.
 */
TABLE("hash", __u64, struct shadow_counts, shadow_counts, MAX_PODS, NO_PREALLOC)

/*
 * agent → `sidestep shadow`; by netns cookie, 0 for all pods that have ended. No program reads this map, nor the next,
 * whose cookies are the same.
 */
TABLE("hash", __u64, struct shadow_sums, shadow_sums, MAX_PODS, NO_PREALLOC)

/* agent → `sidestep shadow` */
TABLE("hash", struct finding_key, struct finding, findings, MAX_FINDINGS, NO_PREALLOC)

/* agent → iterator; key 0 is the only entry */
TABLE("array", __u32, struct choice, choices, 1, 0)

#endif
