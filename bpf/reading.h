/* SPDX-License-Identifier: GPL-2.0 */
/* Fields of the kernel's own structures, at offsets of this kernel (offsets.py); what cannot be read is zero. */
#ifndef SIDESTEP_READING_H
#define SIDESTEP_READING_H

static __always_inline __u32 read32(__u64 from, __u32 offset)
{
    __u32 value = 0;

    bpf_probe_read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

static __always_inline __u64 read64(__u64 from, __u32 offset)
{
    __u64 value = 0;

    bpf_probe_read_kernel(&value, sizeof(value), (void *)(from + offset));
    return value;
}

#endif
