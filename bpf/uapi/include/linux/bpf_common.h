/* SPDX-License-Identifier: GPL-2.0 */
/* The classic BPF opcodes bpf.h builds on; no program of ours is written in them. */
#pragma once
