/* SPDX-License-Identifier: Apache-2.0 */
#include "stream.h"

#include <string.h>

#define WORD sizeof(uint64_t)
#define GOLDEN 0x9e3779b97f4a7c15 /* of splitmix64 (Steele, Lea, Flood 2014), as are the constants below */
#define NEARBY (4 * 1024 * 1024)

static uint64_t mixed(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static uint64_t word_at(uint64_t key, uint64_t index)
{
    return mixed(key + index * GOLDEN);
}

void stream_fill(uint64_t key, uint64_t offset, unsigned char *to, size_t length)
{
    uint64_t index = offset / WORD, word;
    size_t skipped = offset % WORD, part;

    while (length) {
        word = word_at(key, index++);
        part = WORD - skipped < length ? WORD - skipped : length;
        memcpy(to, (unsigned char *)&word + skipped, part);
        to += part;
        length -= part;
        skipped = 0;
    }
}

long stream_check(uint64_t key, uint64_t offset, const unsigned char *from, size_t length)
{
    uint64_t index = offset / WORD, word;
    size_t skipped = offset % WORD, part, at = 0;

    while (at < length) {
        word = word_at(key, index++);
        part = WORD - skipped < length - at ? WORD - skipped : length - at;
        if (memcmp(from + at, (unsigned char *)&word + skipped, part)) {
            while (from[at] == ((unsigned char *)&word)[skipped])
                at++, skipped++;
            return (long)at;
        }
        at += part;
        skipped = 0;
    }
    return -1;
}

int64_t stream_find(uint64_t key, uint64_t offset, const unsigned char *wanted)
{
    static unsigned char window[2 * NEARBY];
    uint64_t start = offset > NEARBY ? offset - NEARBY : 0;
    const unsigned char *found;

    stream_fill(key, start, window, sizeof(window));
    found = memmem(window, sizeof(window), wanted, 16);
    return found ? (int64_t)(start + (uint64_t)(found - window)) : -1;
}

uint64_t dice(uint64_t *state)
{
    return mixed(*state += GOLDEN);
}

size_t dice_length(uint64_t *state)
{
    return 1 + dice(state) % ((size_t)1 << dice(state) % 19);
}
