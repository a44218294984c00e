/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tells the agent which pod was let pass and why, so that somebody who misses the pod in the mesh finds the reason. One
 * message, no answer. The pod has its result already, so nothing here may delay it or fail: if the agent is away, or its
 * backlog is full, nobody is told.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_TOLD (64u << 10) /* bytes; far below what a new socket takes at once (net.core.wmem_default, 208 KiB) */

int connect_to_root(const char *run_dir, const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", run_dir, name);
    struct ucred peer = {0};
    socklen_t size = sizeof(peer);
    int fd;

    if (length < 0 || (size_t)length >= sizeof(address.sun_path))
        return -1;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0
        && getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

void tell_agent(const struct invocation *inv, const struct passed *passed)
{
    json_t *message = json_pack("{s:i, s:s, s:s, s:s, s:s, s:s, s:s}", "version", 1, "command", "PASSED",
                                "container_id", inv->container_id, "namespace", passed->namespace, "name", passed->name,
                                "uid", passed->uid, "reason", passed->reason);
    char *text = message ? json_dumps(message, JSON_COMPACT) : NULL;
    size_t size = text ? strlen(text) : 0;
    uint32_t length = htonl((uint32_t)size);
    struct iovec parts[] = {{.iov_base = &length, .iov_len = sizeof(length)}, {.iov_base = text, .iov_len = size}};
    struct msghdr told = {.msg_iov = parts, .msg_iovlen = 2};
    int fd = size > 0 && size <= MAX_TOLD ? connect_to_root(inv->run_dir, SOCKET_NAME) : -1;

    if (fd < 0)
        return;
    (void)!sendmsg(fd, &told, MSG_NOSIGNAL | MSG_DONTWAIT);
    close(fd);
}
