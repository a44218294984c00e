/* SPDX-License-Identifier: GPL-2.0 */
/* BCC force-includes this file; its own headers ask for the one symbol below. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
