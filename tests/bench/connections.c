/*
 * Connections that a pod's proxy would get, as fast as one process can make both ends of them. Reads lines "CALL SECONDS"
 * and prints how many there were, the seconds that they took, and how many of those this process had a processor.
 *
 * captured: TCP to port 80 of 250 addresses, accepted on 15001 and reset, so that nothing waits.
 * dns: connect() of a UDP socket to port 53, which is the hook and hardly anything else.
 */
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ADDRESSES 250
#define BETWEEN_LOOKS 64 /* at the clock */

static int listener, datagrams;

static double now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static struct sockaddr_in remote(long number, int port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};

    to.sin_addr.s_addr = htonl(0xc6336401 + number % ADDRESSES); /* 198.51.100.1 and on */
    return to;
}

static void captured(long number)
{
    struct linger reset = {1, 0};
    struct sockaddr_in to = remote(number, 80);
    int fd = socket(AF_INET, SOCK_STREAM, 0), accepted;

    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)))
        err(1, "socket");
    if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
        err(1, "connect");
    accepted = accept(listener, 0, 0);
    if (accepted < 0)
        err(1, "accept");
    close(fd);
    close(accepted);
}

static void dns(long number)
{
    struct sockaddr_in to = remote(number, 53);

    if (connect(datagrams, (struct sockaddr *)&to, sizeof(to)))
        err(1, "connect to port 53");
}

int main(void)
{
    struct sockaddr_in proxy = {.sin_family = AF_INET, .sin_port = htons(15001)};
    char name[32];
    double seconds;

    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&proxy, sizeof(proxy)) || listen(listener, 128))
        err(1, "port 15001");
    datagrams = socket(AF_INET, SOCK_DGRAM, 0);
    puts("ready");
    fflush(stdout);
    while (scanf("%31s %lf", name, &seconds) == 2) {
        void (*call)(long) = strcmp(name, "dns") ? captured : dns;
        double began = now(CLOCK_MONOTONIC), busy = now(CLOCK_PROCESS_CPUTIME_ID), spent;
        long count = 0;

        do {
            for (int number = 0; number < BETWEEN_LOOKS; number++)
                call(count++);
            spent = now(CLOCK_MONOTONIC) - began;
        } while (spent < seconds);
        printf("%ld %f %f\n", count, spent, now(CLOCK_PROCESS_CPUTIME_ID) - busy);
        fflush(stdout);
    }
    return 0;
}
