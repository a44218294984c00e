/* SPDX-License-Identifier: Apache-2.0 */
/*
 * istio-cni in sidestep's place. An agent that was killed leaves its entry in the chain, and istio-cni's agent, which
 * may be the next on this node, does not know it. The plugin would wait for an agent that never comes, and no mesh pod
 * could start. So where istio-cni's agent serves and sidestep's is not there, the plugin steps aside: the other agent
 * keeps its own plugin in the chain, and istio-validation in the pod sees whether that has captured it.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* where istio-cni's agent listens for its plugin's log lines (cni/pkg/constants of Istio) */
#define RIVALS_RUN_DIR "/var/run/istio-cni"
#define RIVALS_SOCKET "log.sock"

static bool serves(const struct invocation *inv)
{
    const char *run_dir = json_string_value(json_object_get(inv->config, "istio_cni_run_dir"));
    int fd = connect_to_root(run_dir ? run_dir : RIVALS_RUN_DIR, RIVALS_SOCKET);

    if (fd < 0)
        return false;
    close(fd);
    return true;
}

void step_aside_for_istio_cni(const struct invocation *inv)
{
    if (always_succeeds(inv) || !serves(inv))
        return;
    note("%s: sidestep's agent is away and istio-cni's serves on this node, so this is left to istio-cni; to take the "
         "plugin out of the chain: sidestep uninstall --keep-capture",
         inv->command);
    exit(!strcmp(inv->command, "ADD") && !print_json(unchanged_result(inv)));
}
