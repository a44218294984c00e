/* SPDX-License-Identifier: GPL-2.0 */
#pragma once
#define barrier() __asm__ __volatile__("" ::: "memory")
#define __always_inline inline __attribute__((always_inline))
