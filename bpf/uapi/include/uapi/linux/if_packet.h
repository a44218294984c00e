/* SPDX-License-Identifier: GPL-2.0 */
/* BCC includes this file; our programs use nothing of it (linux/bpf.h is BCC's own copy). */
#pragma once
#include <linux/types.h>
