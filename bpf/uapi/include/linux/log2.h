/* SPDX-License-Identifier: GPL-2.0 */
/* BCC includes it and uses nothing of it. */
#pragma once
