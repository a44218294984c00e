/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The exchange with the agent. Each side sends one JSON message, with its length in front, over a unix stream socket.
 * With its first bytes the shim passes the pod's network namespace as a descriptor. Nothing blocks, and one deadline
 * holds for the whole exchange. So neither a full backlog nor an agent that drips bytes can delay a pod longer than
 * configured.
 *
 * ADD waits for an agent that is away, as long as it would wait for an answer: an agent that is being replaced is back
 * within seconds, but once a sandbox has failed, kubelet waits longer than that. All other commands fail at once. STATUS
 * and CHECK are about now, and of what DEL and GC miss the next agent takes care.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_ANSWER (8u << 20)
#define BACKLOG_PAUSE_MS 5
#define AWAY_PAUSE_MS 50

struct exchange {
    const struct invocation *inv;
    int fd;
    long long arrival_ms;  /* until then an agent that is away is waited for */
    long long deadline_ms; /* of the exchange with an agent that is there */
    struct sockaddr_un address;
};

static long long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* When the time for one exchange is over, if it begins now. */
static long long deadline_of(const struct invocation *inv)
{
    return now_ms() + (long long)(inv->timeout * 1000);
}

/* The code of a failure. STATUS has one code for everything that keeps the agent from serving. */
static enum code code_of(const struct invocation *inv, enum code otherwise)
{
    return strcmp(inv->command, "STATUS") ? otherwise : NOT_AVAILABLE;
}

/* The code of a failure that ends by itself when the agent is back. */
static enum code away(const struct invocation *inv)
{
    return code_of(inv, TRY_AGAIN_LATER);
}

static bool is_add(const struct invocation *inv)
{
    return !strcmp(inv->command, "ADD");
}

static _Noreturn void unreachable(const struct exchange *ex, int error)
{
    char waited[32] = "";

    if (is_add(ex->inv))
        snprintf(waited, sizeof(waited), " within %g s", ex->inv->timeout);
    fail_unless_leaving(ex->inv, away(ex->inv), "cannot reach %s%s: %s; is the sidestep agent running on this node?",
                        ex->address.sun_path, waited, strerror(error));
}

static _Noreturn void garbage(const struct exchange *ex, const char *what)
{
    fail_unless_leaving(ex->inv, code_of(ex->inv, IO_FAILURE),
                        "the agent at %s answered garbage (%s); are shim and agent of one version?",
                        ex->address.sun_path, what);
}

static _Noreturn void hung_up(const struct exchange *ex)
{
    fail_unless_leaving(ex->inv, away(ex->inv), "the agent at %s closed the connection without an answer; did it end?",
                        ex->address.sun_path);
}

/* Whether it is worth trying again after the agent was found to be away; waits a little if so. */
static bool wait_for_agent(const struct exchange *ex)
{
    if (!is_add(ex->inv) || now_ms() >= ex->arrival_ms)
        return false;
    poll(NULL, 0, AWAY_PAUSE_MS);
    return true;
}

static int remaining_ms(const struct exchange *ex)
{
    long long left = ex->deadline_ms - now_ms();

    if (left <= 0)
        fail_unless_leaving(ex->inv, away(ex->inv), "the agent at %s did not answer within %g s", ex->address.sun_path,
                            ex->inv->timeout);
    return (int)left;
}

static void wait_for(const struct exchange *ex, short events)
{
    struct pollfd ready = {.fd = ex->fd, .events = events};
    int found;

    do
        found = poll(&ready, 1, remaining_ms(ex));
    while (found == 0 || (found < 0 && errno == EINTR));
}

/* The answer decides what is captured, so only root may give it. (Root could decide that without the plugin too.) */
static void require_root(const struct exchange *ex)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);

    if (getsockopt(ex->fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        unreachable(ex, errno);
    if (peer.uid != 0)
        fail_unless_leaving(ex->inv, away(ex->inv), "%s is served by uid %u, not by root; stop the process behind it",
                            ex->address.sun_path, peer.uid);
}

static void set_address(struct exchange *ex)
{
    int length = snprintf(ex->address.sun_path, sizeof(ex->address.sun_path), "%s/" SOCKET_NAME, ex->inv->run_dir);

    ex->address.sun_family = AF_UNIX;
    if (length < 0 || (size_t)length >= sizeof(ex->address.sun_path))
        fail(ex->inv, INVALID_CONFIG, "cni_agent_run_dir \"%s\" is too long for a socket path; at most %zu bytes",
             ex->inv->run_dir, sizeof(ex->address.sun_path) - sizeof("/" SOCKET_NAME));
}

static void open_exchange(struct exchange *ex)
{
    ex->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (ex->fd < 0)
        unreachable(ex, errno);
    ex->deadline_ms = deadline_of(ex->inv);
    while (connect(ex->fd, (struct sockaddr *)&ex->address, sizeof(ex->address)) < 0) {
        if (errno == ENOENT || errno == ECONNREFUSED) {
            int away = errno;

            step_aside_for_istio_cni(ex->inv);
            if (!wait_for_agent(ex))
                unreachable(ex, away);
            ex->deadline_ms = deadline_of(ex->inv);
        } else if (errno == EAGAIN || errno == EINTR) { /* a full backlog; poll() does not tell when it has room */
            (void)remaining_ms(ex);
            poll(NULL, 0, BACKLOG_PAUSE_MS);
        } else {
            unreachable(ex, errno);
        }
    }
    require_root(ex);
}

static bool is_hang_up(int error)
{
    return error == EPIPE || error == ECONNRESET;
}

/* Send all bytes. The descriptor goes with the first of them; -1: none. False if the agent hangs up. */
static bool send_all(struct exchange *ex, const char *data, size_t size, int descriptor)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (char *)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (descriptor >= 0) {
        message.msg_control = control.room;
        message.msg_controllen = sizeof(control.room);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), &descriptor, sizeof(int));
    }
    while (part.iov_len > 0) {
        ssize_t sent = sendmsg(ex->fd, &message, MSG_NOSIGNAL);

        if (sent >= 0) {
            part.iov_base = (char *)part.iov_base + sent;
            part.iov_len -= (size_t)sent;
            message.msg_control = NULL;
            message.msg_controllen = 0;
        } else if (errno == EAGAIN) {
            wait_for(ex, POLLOUT);
        } else if (is_hang_up(errno)) {
            return false;
        } else if (errno != EINTR) {
            unreachable(ex, errno);
        }
    }
    return true;
}

/* False if the agent hangs up. */
static bool receive_all(struct exchange *ex, char *data, size_t size)
{
    for (size_t have = 0; have < size;) {
        ssize_t got;

        (void)remaining_ms(ex); /* the deadline holds also while bytes keep coming */
        got = recv(ex->fd, data + have, size - have, 0);
        if (got > 0)
            have += (size_t)got;
        else if (got == 0 || is_hang_up(errno))
            return false;
        else if (errno == EAGAIN)
            wait_for(ex, POLLIN);
        else if (errno != EINTR)
            unreachable(ex, errno);
    }
    return true;
}

static char *request_of(const struct invocation *inv)
{
    json_t *request = json_pack("{s:i, s:s, s:s, s:s, s:s, s:s, s:O}", "version", 1, "command", inv->command,
                                "container_id", inv->container_id, "ifname", inv->ifname, "netns", inv->netns, "args",
                                inv->args, "config", inv->config);
    char *text = request ? json_dumps(request, JSON_COMPACT) : NULL;

    if (!text)
        fail(inv, INVALID_ENVIRONMENT, "CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS and CNI_ARGS must be UTF-8");
    return text;
}

static json_t *checked_answer(const struct exchange *ex, const char *text, size_t size)
{
    json_error_t error;
    json_t *answer = json_loadb(text, size, JSON_ALLOW_NUL, &error);
    json_t *status, *output;

    if (!answer)
        garbage(ex, error.text);
    status = json_object_get(answer, "exit");
    output = json_object_get(answer, "output");
    if (!json_is_integer(status) || !(json_is_object(output) || json_is_null(output)))
        garbage(ex, "not an object with exit and output");
    if (json_integer_value(status) != 0 && !json_is_object(output))
        garbage(ex, "a failure without an error object");
    return answer;
}

/* One exchange. NULL if the agent hangs up before its answer is complete. */
static json_t *exchange_with(struct exchange *ex, const char *request)
{
    uint32_t length = htonl((uint32_t)strlen(request));
    char *text;

    if (!send_all(ex, (char *)&length, sizeof(length), ex->inv->netns_fd) || !send_all(ex, request, strlen(request), -1)
        || !receive_all(ex, (char *)&length, sizeof(length)))
        return NULL;
    length = ntohl(length);
    if (length == 0 || length > MAX_ANSWER)
        garbage(ex, "an impossible length");
    text = malloc(length);
    if (!text)
        fail(ex->inv, INTERNAL, "out of memory for an answer of %u bytes", length);
    return receive_all(ex, text, length) ? checked_answer(ex, text, length) : NULL;
}

json_t *ask_agent(const struct invocation *inv)
{
    struct exchange ex = {.inv = inv, .arrival_ms = deadline_of(inv)};
    char *request = request_of(inv);
    json_t *answer;

    set_address(&ex);
    for (;;) {
        open_exchange(&ex);
        answer = exchange_with(&ex, request);
        if (answer)
            return answer;
        close(
            ex.fd); /* an agent that ends closes what it has not accepted: the next one answers. ADD may be repeated */
        if (!wait_for_agent(&ex))
            hung_up(&ex);
    }
}
