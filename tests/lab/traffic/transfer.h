/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One connection, both ways at once: each end sends so many bytes, closes its half, and wants the other's to the byte.
 *
 * One of them, in turn, closes its half only when it has the other's all: Envoy's tcp_proxy loses what it still holds one
 * way when the last of the other way is through and both ends have closed (it closes without flushing), over plain TCP too.
 */
#ifndef TRAFFIC_TRANSFER_H
#define TRAFFIC_TRANSFER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The client's first bytes on a connection: what is to come. Host order: both ends are on one machine. */
struct hello {
    uint64_t magic, seed;
    uint64_t up, down; /* bytes client to server, server to client */
    uint32_t number;
    uint32_t pause; /* mean microseconds */
    uint32_t server_blocks, zero;
};

#define HELLO_MAGIC 0x7472616666696331

/* One direction as one end has it. Times are CLOCK_MONOTONIC nanoseconds. */
struct half {
    const char *what; /* "sending up", ... */
    uint64_t key, total, done, dice, resume_at;
    uint32_t pause;
    atomic_bool over;
};

struct transfer {
    int fd;
    uint32_t number;
    bool blocks, closes_last;
    struct half out, in;
    _Atomic uint64_t moved_at;
    atomic_int halves_left;          /* blocking mode: one thread each */
    bool readable, writable, listed; /* edge-triggered mode */
    struct transfer *next;
    struct transfer *next_alive, *previous_alive;
};

enum step {
    MOVED,
    WOULD_BLOCK,
    OVER,
};

/* What this process has done so far. */
extern struct counters {
    _Atomic uint64_t sent, received, finished, again;
    atomic_int alive;
} counters;

uint64_t now_ns(void);

/* `is_client` says which end; does not start anything. */
struct transfer *transfer_new(int fd, const struct hello *hello, bool is_client);
void transfer_end(struct transfer *transfer);

/* One message out, or one read in; `buffer` has MAX_MESSAGE bytes. A wrong byte or a lost one ends the process. */
enum step transfer_push(struct transfer *transfer, unsigned char *buffer);
enum step transfer_pull(struct transfer *transfer, unsigned char *buffer);

/* In a thread of its own: end the process when a transfer has not moved for so long. */
void watch_for_stalls(unsigned seconds);

/* Say what went wrong and end the process. */
_Noreturn void fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
