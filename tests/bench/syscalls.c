/*
 * How long system calls take that hooks may slow down. Reads lines "CALL COUNT" and prints the nanoseconds of one call, the
 * mean over COUNT, so that the clock is not what is measured. All within the loopback of the namespace it runs in.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_in here = {.sin_family = AF_INET};
static int datagrams, bound, listener;

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static int local(int type)
{
    socklen_t length = sizeof(here);
    int fd = socket(AF_INET, type, 0);

    here.sin_port = 0;
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here))
        || getsockname(fd, (struct sockaddr *)&here, &length))
        err(1, "a socket on loopback");
    return fd;
}

static void get_option(void)
{
    int value;
    socklen_t length = sizeof(value);

    if (getsockopt(datagrams, SOL_SOCKET, SO_RCVBUF, &value, &length))
        err(1, "getsockopt");
}

static void open_socket(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (fd < 0)
        err(1, "socket");
    close(fd);
}

/* Of UDP: the hook and hardly anything else */
static void connect_datagrams(void)
{
    if (connect(datagrams, (struct sockaddr *)&here, sizeof(here)))
        err(1, "connect");
}

/* The peer's buffer is full soon; what does not fit is dropped at once */
static void send_datagram(void)
{
    struct iovec byte = {"x", 1};
    struct msghdr message = {.msg_name = &here, .msg_namelen = sizeof(here), .msg_iov = &byte, .msg_iovlen = 1};

    if (sendmsg(datagrams, &message, 0) != 1)
        err(1, "sendmsg");
}

/* With the handshake, and closed by a reset so that nothing waits */
static double connect_stream(int count)
{
    struct linger reset = {1, 0};
    struct sockaddr_in to = {.sin_family = AF_INET};
    socklen_t length = sizeof(to);
    double spent = 0, began;

    getsockname(listener, (struct sockaddr *)&to, &length);
    for (int number = 0; number < count; number++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0), accepted;

        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
        began = now();
        if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
            err(1, "connect");
        spent += now() - began;
        accepted = accept(listener, 0, 0);
        close(fd);
        close(accepted);
    }
    return spent / count;
}

static double repeat(void (*call)(void), int count)
{
    double began = now();

    for (int number = 0; number < count; number++)
        call();
    return (now() - began) / count;
}

int main(void)
{
    static const struct {
        const char *name;
        void (*call)(void);
    } calls[] = {
        {"getsockopt", get_option},
        {"socket", open_socket},
        {"connect-udp", connect_datagrams},
        {"sendmsg", send_datagram},
    };
    char name[32];
    int count;

    inet_pton(AF_INET, "127.0.0.1", &here.sin_addr);
    listener = local(SOCK_STREAM);
    if (listen(listener, 16))
        err(1, "listen");
    datagrams = socket(AF_INET, SOCK_DGRAM, 0);
    bound = local(SOCK_DGRAM); /* `here` is its address from now on */
    puts("ready");
    fflush(stdout);
    while (scanf("%31s %d", name, &count) == 2) {
        double spent = -1;

        if (!strcmp(name, "connect-tcp"))
            spent = connect_stream(count);
        for (size_t each = 0; each < sizeof(calls) / sizeof(*calls); each++)
            if (!strcmp(name, calls[each].name))
                spent = repeat(calls[each].call, count);
        if (spent < 0)
            errx(1, "%s is no call of ours", name);
        printf("%f\n", spent);
        fflush(stdout);
    }
    return 0;
}
