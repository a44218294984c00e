/* SPDX-License-Identifier: Apache-2.0 */
/* What moves transfers: event loops, edge-triggered as Envoy's, or two threads that block, as simple programs have. */
#ifndef TRAFFIC_ENGINE_H
#define TRAFFIC_ENGINE_H

#include "transfer.h"

/* Start the event loops and the watch for stalls; `on_end` is called, in any thread, whenever a transfer has ended. */
void engine_start(unsigned stall_seconds, void (*on_end)(void));

/* Hand a transfer over. */
void engine_take(struct transfer *transfer, bool blocks);

#endif
