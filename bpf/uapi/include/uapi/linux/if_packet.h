/* SPDX-License-Identifier: GPL-2.0 */
/* BCC includes it; our programs use nothing of it (bpf.h is BCC's own copy). */
#pragma once
#include <linux/types.h>
