/*
 * LD_PRELOAD for load generators that cannot name a unix socket: whatever they connect to over IPv4 is the unix socket at
 * $UNIX_WAY. Only for the scenario without interception; the programs are otherwise as they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

typedef int connecting(int, const struct sockaddr *, socklen_t);

int connect(int fd, const struct sockaddr *to, socklen_t length)
{
    connecting *next = (connecting *)dlsym(RTLD_NEXT, "connect");
    struct sockaddr_un way = {.sun_family = AF_UNIX};
    const char *path = getenv("UNIX_WAY");
    int flags = fcntl(fd, F_GETFL), replacement;

    if (to->sa_family != AF_INET || !path || strlen(path) >= sizeof(way.sun_path))
        return next(fd, to, length);
    strcpy(way.sun_path, path);
    replacement = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (replacement < 0)
        return -1;
    if (dup3(replacement, fd, O_CLOEXEC) < 0 || fcntl(fd, F_SETFL, flags) < 0) {
        close(replacement);
        return -1;
    }
    close(replacement);
    return next(fd, (struct sockaddr *)&way, sizeof(way));
}
