/* SPDX-License-Identifier: GPL-2.0 */
/* Our programs do not depend on a version; BCC only needs the macros to exist. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
