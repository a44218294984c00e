/* SPDX-License-Identifier: Apache-2.0 */
/* What is sent: bytes that follow from a key and their position, so that a wrong one is known at once, and where from. */
#ifndef TRAFFIC_STREAM_H
#define TRAFFIC_STREAM_H

#include <stddef.h>
#include <stdint.h>

#define MAX_MESSAGE (256 * 1024)

/* The bytes of stream `key` from `offset` on. */
void stream_fill(uint64_t key, uint64_t offset, unsigned char *to, size_t length);

/* Index of the first byte that is not the stream's, or -1. */
long stream_check(uint64_t key, uint64_t offset, const unsigned char *from, size_t length);

/* Where within 4 MiB of `offset` the stream has these 16 bytes, or -1: tells lost and swapped bytes from broken ones. */
int64_t stream_find(uint64_t key, uint64_t offset, const unsigned char *wanted);

/* The next number of a sequence that is told by its seed (splitmix64). */
uint64_t dice(uint64_t *state);

/* 1 byte to MAX_MESSAGE, each power of two as likely as the next. */
size_t dice_length(uint64_t *state);

#endif
