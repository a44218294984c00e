/* SPDX-License-Identifier: GPL-2.0 */
/* Our programs do not depend on the kernel's version. The macros exist because BCC needs them. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
