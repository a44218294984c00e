/* SPDX-License-Identifier: GPL-2.0 */
/* BCC uses PAGE_SIZE for perf buffers, which we do not have. */
#pragma once
#define PAGE_SIZE 4096
