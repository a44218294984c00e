/* SPDX-License-Identifier: GPL-2.0 */
/* In the kernel: the opcodes of classic BPF, on which bpf.h builds. Our programs use none of them. */
#pragma once
