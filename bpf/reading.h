/* SPDX-License-Identifier: GPL-2.0 */
/* Fields of the kernel's own structures, at offsets of this kernel (offsets.py); what cannot be read is zero. */
#ifndef SIDESTEP_READING_H
#define SIDESTEP_READING_H

/*
 * bpf_probe_read_kernel by its number (uapi/linux/bpf.h): by its name BCC puts an older helper in its place wherever it may
 * not read the kernel's symbols, as in a container, and that one is not for these program types.
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
