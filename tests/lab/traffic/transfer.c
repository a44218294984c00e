/* SPDX-License-Identifier: Apache-2.0 */
#include "transfer.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "stream.h"

#define EXIT_WRONG 1
#define EXIT_STALLED 2

struct counters counters;

static pthread_mutex_t alive_lock = PTHREAD_MUTEX_INITIALIZER;
static struct transfer *alive;

void fail(int status, const char *format, ...)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    va_list arguments;

    pthread_mutex_lock(&once); /* never released: one says it, and ends all */
    va_start(arguments, format);
    fprintf(stderr, "%.6f: ", (double)now_ns() / 1e9); /* which end was first? */
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    fflush(NULL);
    _exit(status);
}

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static struct half half_of(const struct hello *hello, bool is_up, bool is_sending)
{
    static const char *const names[2][2] = {{"receiving down", "sending down"}, {"receiving up", "sending up"}};
    uint64_t key = hello->seed ^ ((uint64_t)hello->number << 32 | is_up);

    dice(&key);
    return (struct half){
        .what = names[is_up][is_sending],
        .key = key,
        .dice = key + is_sending,
        .total = is_up ? hello->up : hello->down,
        .pause = hello->pause,
    };
}

struct transfer *transfer_new(int fd, const struct hello *hello, bool is_client)
{
    struct transfer *made = calloc(1, sizeof(*made));

    if (!made)
        fail(EXIT_WRONG, "out of memory");
    made->fd = fd;
    made->number = hello->number;
    made->closes_last = hello->number % 3 % 2 == is_client;
    made->out = half_of(hello, is_client, true);
    made->in = half_of(hello, !is_client, false);
    made->moved_at = now_ns();
    made->halves_left = 2;
    counters.alive++;
    pthread_mutex_lock(&alive_lock);
    made->next_alive = alive;
    if (alive)
        alive->previous_alive = made;
    alive = made;
    pthread_mutex_unlock(&alive_lock);
    return made;
}

void transfer_end(struct transfer *transfer)
{
    pthread_mutex_lock(&alive_lock);
    if (transfer->next_alive)
        transfer->next_alive->previous_alive = transfer->previous_alive;
    if (transfer->previous_alive)
        transfer->previous_alive->next_alive = transfer->next_alive;
    else
        alive = transfer->next_alive;
    pthread_mutex_unlock(&alive_lock);
    close(transfer->fd);
    free(transfer);
    counters.finished++;
    counters.alive--;
}

/* Every sixteenth time a pause, and now and then one in which every queue on the way fills, or empties. */
static void maybe_pause(struct half *half)
{
    uint64_t chance = dice(&half->dice) % 512, microseconds;

    if (!half->pause || chance >= 32)
        return;
    microseconds = dice(&half->dice) % (2 * half->pause);
    half->resume_at = now_ns() + microseconds * (chance ? 1000 : 50000);
}

/* In up to three pieces, as proxies read and write. */
static int pieces(struct half *half, unsigned char *buffer, size_t length, struct iovec *vector)
{
    size_t first = 1 + dice(&half->dice) % length, second = (length - first) / 2;
    int count = 0;

    vector[count++] = (struct iovec){buffer, first};
    if (second)
        vector[count++] = (struct iovec){buffer + first, second};
    if (first + second < length)
        vector[count++] = (struct iovec){buffer + first + second, length - first - second};
    return count;
}

static _Noreturn void broken(const struct transfer *transfer, const struct half *half, const char *how)
{
    fail(EXIT_WRONG, "connection %u, %s: %s after %" PRIu64 " of %" PRIu64 " bytes", transfer->number, half->what, how,
         half->done, half->total);
}

/* A blocking call that says EAGAIN has not blocked: counted, and tried again. */
static enum step after_error(struct transfer *transfer, struct half *half)
{
    if (errno == EINTR)
        return MOVED;
    if (errno != EAGAIN)
        broken(transfer, half, strerror(errno));
    if (!transfer->blocks)
        return WOULD_BLOCK;
    counters.again++;
    half->resume_at = now_ns() + 100000;
    return MOVED;
}

enum step transfer_push(struct transfer *transfer, unsigned char *buffer)
{
    struct half *half = &transfer->out;
    struct iovec vector[3];
    struct msghdr message = {.msg_iov = vector};
    size_t length = dice_length(&half->dice);
    ssize_t sent;

    if (half->done == half->total) {
        if (transfer->closes_last && !transfer->in.over) {
            half->resume_at = now_ns() + 1000000;
            return MOVED;
        }
        if (shutdown(transfer->fd, SHUT_WR))
            broken(transfer, half, strerror(errno));
        half->over = true;
        return OVER;
    }
    if (length > half->total - half->done)
        length = half->total - half->done;
    stream_fill(half->key, half->done, buffer, length);
    message.msg_iovlen = pieces(half, buffer, length, vector);
    sent = sendmsg(transfer->fd, &message, MSG_NOSIGNAL | (transfer->blocks ? 0 : MSG_DONTWAIT));
    if (sent < 0)
        return after_error(transfer, half);
    half->done += sent;
    counters.sent += sent;
    transfer->moved_at = now_ns();
    maybe_pause(half);
    return MOVED;
}

static void check(struct transfer *transfer, struct half *half, const unsigned char *buffer, size_t length)
{
    long wrong = stream_check(half->key, half->done, buffer, length);
    char what[128];

    if (half->done + length > half->total)
        broken(transfer, half, "more than there was");
    if (wrong < 0)
        return;
    half->done += wrong;
    snprintf(what, sizeof(what), "wrong; in a read of %zu, these bytes are those from %" PRId64 " on;", length,
             length - wrong < 16 ? -2 : stream_find(half->key, half->done, buffer + wrong));
    broken(transfer, half, what);
}

enum step transfer_pull(struct transfer *transfer, unsigned char *buffer)
{
    struct half *half = &transfer->in;
    struct iovec vector[3];
    struct msghdr message = {.msg_iov = vector};
    ssize_t got;

    message.msg_iovlen = pieces(half, buffer, dice_length(&half->dice), vector);
    got = recvmsg(transfer->fd, &message, transfer->blocks ? 0 : MSG_DONTWAIT);
    if (got < 0)
        return after_error(transfer, half);
    transfer->moved_at = now_ns();
    if (!got) {
        if (half->done != half->total)
            broken(transfer, half, "ended");
        half->over = true;
        return OVER;
    }
    check(transfer, half, buffer, got);
    half->done += got;
    counters.received += got;
    maybe_pause(half);
    return MOVED;
}

static int describe(const struct transfer *each, char *to, size_t room)
{
    int readable = -1, unsent = -1;

    ioctl(each->fd, SIOCINQ, &readable);
    ioctl(each->fd, SIOCOUTQ, &unsent);
    return snprintf(to, room,
                    "connection %u (%s): sent %" PRIu64 " of %" PRIu64 "%s, received %" PRIu64 " of %" PRIu64
                    "%s, FIONREAD %d, unacknowledged %d\n",
                    each->number, each->blocks ? "blocking" : "edge-triggered", each->out.done, each->out.total,
                    each->out.over ? " and closed" : "", each->in.done, each->in.total,
                    each->in.over ? " and closed" : "", readable, unsent);
}

void watch_for_stalls(unsigned seconds)
{
    static char text[4096];
    int used = 0;

    for (;; sleep(1)) {
        pthread_mutex_lock(&alive_lock);
        for (struct transfer *each = alive; each; each = each->next_alive)
            if (each->moved_at + seconds * 1000000000ULL < now_ns() && used < (int)sizeof(text) - 256)
                used += describe(each, text + used, sizeof(text) - used);
        pthread_mutex_unlock(&alive_lock);
        if (used)
            fail(EXIT_STALLED, "nothing has moved for %u s:\n%s", seconds, text);
    }
}
