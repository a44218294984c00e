/* SPDX-License-Identifier: GPL-2.0 */
/* BCC uses PAGE_SIZE for perf buffers only. Our programs have none, so the value does not matter. */
#pragma once
#define PAGE_SIZE 4096
