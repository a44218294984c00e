/* SPDX-License-Identifier: Apache-2.0 */
/*
 * traffic server PORT
 *     serves until its standard input ends.
 * traffic client ADDRESS PORT SECONDS BYTES CONNECTIONS PARALLEL MEAN PAUSE SEED
 *     makes connections, PARALLEL at a time, until one of the first three limits is reached (bytes both ways together;
 *     CONNECTIONS 0 is without) or it gets SIGTERM, each of 0 to 2 * MEAN bytes a way, with pauses of PAUSE microseconds on average.
 *
 * Both print what they have done as JSON. Exit status 1: bytes wrong, lost, or a connection broken; 2: nothing moved.
 */
#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"
#include "stream.h"

#define STALL_SECONDS 20
#define HELLO_MILLISECONDS 20000

static sem_t slots;
static volatile sig_atomic_t stopping;

static void stop(int number)
{
    (void)number;
    stopping = 1;
}

static void free_slot(void)
{
    sem_post(&slots);
}

static void nothing(void)
{
}

static void summarise(uint64_t started)
{
    printf("{\"finished\": %" PRIu64 ", \"unfinished\": %d, \"sent\": %" PRIu64 ", \"received\": %" PRIu64
           ", \"again\": %" PRIu64 ", \"seconds\": %.3f}\n",
           counters.finished, counters.alive, counters.sent, counters.received, counters.again,
           (double)(now_ns() - started) / 1e9);
    fflush(stdout);
}

static void *serve_until_told(void *started)
{
    char byte;

    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    while (counters.alive) /* clients see the end of a connection first; if it does not come, that is a stall */
        usleep(1000);
    summarise(*(uint64_t *)started);
    _exit(0);
}

/* The hello of a new connection, however it is cut. */
static bool receive_hello(int fd, struct hello *hello)
{
    struct pollfd wanted = {fd, POLLIN, 0};
    size_t have = 0;
    ssize_t got;

    while (have < sizeof(*hello)) {
        if (poll(&wanted, 1, HELLO_MILLISECONDS) != 1)
            return false;
        got = recv(fd, (char *)hello + have, sizeof(*hello) - have, MSG_DONTWAIT);
        if (!got || (got < 0 && errno != EAGAIN))
            return false;
        have += got > 0 ? got : 0;
    }
    return hello->magic == HELLO_MAGIC;
}

static void serve(const char *port)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), fd, yes = 1;
    static uint64_t started;
    struct hello hello;
    pthread_t waiter;

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    if (bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 1024))
        fail(1, "cannot listen at port %s: %m", port);
    engine_start(STALL_SECONDS, nothing);
    started = now_ns();
    pthread_create(&waiter, NULL, serve_until_told, &started);
    puts("ready");
    fflush(stdout);
    for (;;) {
        fd = accept(listener, NULL, NULL);
        if (fd < 0)
            fail(1, "accept: %m");
        if (!receive_hello(fd, &hello))
            fail(1, "a connection without a hello");
        engine_take(transfer_new(fd, &hello, false), hello.server_blocks);
    }
}

/* Each of the four combinations of ends that block and ends that do not comes in turn. */
static void open_one(const struct addrinfo *to, struct hello *hello)
{
    int fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (connect(fd, to->ai_addr, to->ai_addrlen))
        fail(1, "connection %u: connect: %m", hello->number);
    hello->server_blocks = hello->number / 2 % 2;
    if (send(fd, hello, sizeof(*hello), MSG_NOSIGNAL) != sizeof(*hello))
        fail(1, "connection %u: hello: %m", hello->number);
    engine_take(transfer_new(fd, hello, true), hello->number % 2);
}

static void call(char **arguments)
{
    uint64_t started = now_ns(), seconds = strtoull(arguments[2], NULL, 0), bytes = strtoull(arguments[3], NULL, 0);
    uint64_t connections = strtoull(arguments[4], NULL, 0), mean = strtoull(arguments[6], NULL, 0), asked = 0;
    uint64_t seed = strtoull(arguments[8], NULL, 0), state = seed;
    struct hello hello = {.magic = HELLO_MAGIC, .seed = seed, .pause = strtoul(arguments[7], NULL, 0)};
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM}, *to;
    int parallel = atoi(arguments[5]);

    if (getaddrinfo(arguments[0], arguments[1], &hints, &to))
        fail(1, "%s is no address", arguments[0]);
    sem_init(&slots, 0, parallel);
    signal(SIGTERM, stop);
    engine_start(STALL_SECONDS, free_slot);
    for (; !stopping && asked < bytes && now_ns() < started + seconds * 1000000000; hello.number++) {
        if (connections && hello.number == connections)
            break;
        while (sem_wait(&slots)) /* interrupted */
            ;
        hello.up = dice(&state) % (2 * mean + 1);
        hello.down = dice(&state) % (2 * mean + 1);
        asked += hello.up + hello.down;
        open_one(to, &hello);
    }
    while (parallel)
        if (!sem_wait(&slots))
            parallel--;
    summarise(started);
}

int main(int count, char **arguments)
{
    signal(SIGPIPE, SIG_IGN);
    if (count == 3 && !strcmp(arguments[1], "server"))
        serve(arguments[2]);
    else if (count == 11 && !strcmp(arguments[1], "client"))
        call(arguments + 2);
    else
        fail(64, "usage: traffic server PORT\n"
                 "       traffic client ADDRESS PORT SECONDS BYTES CONNECTIONS PARALLEL MEAN PAUSE SEED");
    return 0;
}
