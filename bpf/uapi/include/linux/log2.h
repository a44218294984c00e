/* SPDX-License-Identifier: GPL-2.0 */
/* BCC includes this file but uses nothing of it. */
#pragma once
