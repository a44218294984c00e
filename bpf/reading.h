/* SPDX-License-Identifier: GPL-2.0 */
/* Reads fields of the kernel's own structures, at this kernel's offsets (offsets.py). A failed read gives zero. */
#ifndef SIDESTEP_READING_H
#define SIDESTEP_READING_H

/*
 * bpf_probe_read_kernel, called by its number (uapi/linux/bpf.h). If it were called by its name, BCC would replace it
 * by an older helper wherever BCC may not read the kernel's symbols, as in a container. These program types may not
 * call the older helper.
 */
static long (*const read_kernel)(void *to, __u32 size, const void *from) = (void *)113;

static __always_inline __u32 read32(__u64 from, __u32 offset)
{
    __u32 value = 0;

    read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

static __always_inline __u64 read64(__u64 from, __u32 offset)
{
    __u64 value = 0;

    read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

#endif
