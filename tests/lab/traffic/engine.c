/* SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>

#include "stream.h"

#define LOOPS 2
#define EVENTS 64
#define LONGEST_WAIT 1000000000 /* ns */

static int loops[LOOPS];
static void (*ended)(void);

static void start(void *(*work)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int error;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 128 * 1024);
    error = pthread_create(&thread, &attributes, work, argument);
    if (error)
        fail(1, "cannot start a thread: %s", strerror(error));
    pthread_attr_destroy(&attributes);
}

static unsigned char *new_buffer(void)
{
    unsigned char *made = malloc(MAX_MESSAGE);

    if (!made)
        fail(1, "out of memory");
    return made;
}

static void end(struct transfer *transfer)
{
    transfer_end(transfer);
    ended();
}

static void block(struct transfer *transfer, struct half *half, enum step (*move)(struct transfer *, unsigned char *))
{
    unsigned char *buffer = new_buffer();

    while (move(transfer, buffer) != OVER) {
        if (half->resume_at > now_ns()) {
            struct timespec until = {half->resume_at / 1000000000, half->resume_at % 1000000000};

            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        }
    }
    free(buffer);
    if (!--transfer->halves_left)
        end(transfer);
}

static void *push_all(void *transfer)
{
    block(transfer, &((struct transfer *)transfer)->out, transfer_push);
    return NULL;
}

static void *pull_all(void *transfer)
{
    block(transfer, &((struct transfer *)transfer)->in, transfer_pull);
    return NULL;
}

/* One step of one half if it can; returns in how many nanoseconds to come again at the latest. */
static uint64_t step(struct transfer *transfer, struct half *half, bool *ready,
                     enum step (*move)(struct transfer *, unsigned char *), unsigned char *buffer)
{
    uint64_t now = now_ns();

    if (half->over || !*ready)
        return LONGEST_WAIT;
    if (half->resume_at <= now && move(transfer, buffer) == WOULD_BLOCK)
        *ready = false; /* and only now: edges come once */
    if (half->over || !*ready)
        return LONGEST_WAIT;
    return half->resume_at > now ? half->resume_at - now : 0;
}

/* A step of every transfer; those at their end leave the list. */
static uint64_t step_all(struct transfer **list, unsigned char *buffer)
{
    uint64_t soonest = LONGEST_WAIT, wait;
    struct transfer *each;

    while ((each = *list)) {
        wait = step(each, &each->in, &each->readable, transfer_pull, buffer);
        soonest = wait < soonest ? wait : soonest;
        wait = step(each, &each->out, &each->writable, transfer_push, buffer);
        soonest = wait < soonest ? wait : soonest;
        if (each->in.over && each->out.over) {
            *list = each->next;
            end(each); /* closing takes it out of the epoll set */
        } else {
            list = &each->next;
        }
    }
    return soonest;
}

static void *run_loop(void *loop)
{
    unsigned char *buffer = new_buffer();
    struct epoll_event events[EVENTS];
    struct transfer *list = NULL, *each;
    struct timespec wait = {0};
    uint64_t soonest;
    int count;

    for (;;) {
        count = epoll_pwait2(*(int *)loop, events, EVENTS, &wait, NULL);
        for (int i = 0; i < count; i++) {
            each = events[i].data.ptr;
            each->readable |= !!(events[i].events & ~EPOLLOUT);
            each->writable |= !!(events[i].events & ~(EPOLLIN | EPOLLRDHUP));
            if (!each->listed) {
                each->listed = true;
                each->next = list;
                list = each;
            }
        }
        soonest = step_all(&list, buffer);
        wait = (struct timespec){soonest / 1000000000, soonest % 1000000000};
    }
    return NULL;
}

static void *watch(void *seconds)
{
    watch_for_stalls((unsigned)(uintptr_t)seconds);
    return NULL;
}

void engine_start(unsigned stall_seconds, void (*on_end)(void))
{
    ended = on_end;
    for (int i = 0; i < LOOPS; i++) {
        loops[i] = epoll_create1(EPOLL_CLOEXEC);
        start(run_loop, &loops[i]);
    }
    start(watch, (void *)(uintptr_t)stall_seconds);
}

void engine_take(struct transfer *transfer, bool blocks)
{
    struct epoll_event wanted = {EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, {.ptr = transfer}};

    transfer->blocks = blocks;
    if (blocks) {
        start(push_all, transfer);
        start(pull_all, transfer);
    } else if (epoll_ctl(loops[transfer->number % LOOPS], EPOLL_CTL_ADD, transfer->fd, &wanted)) {
        fail(1, "epoll_ctl: %m");
    }
}
