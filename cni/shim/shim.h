/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shared by the shim's parts. sidestep-cni.c reads and checks the invocation, policy.c decides what needs no agent,
 * agent.c asks the agent, rival.c looks for istio-cni's where ours is away, tell.c tells ours what needs no answer,
 * outcome.c prints how the invocation ends.
 */
#ifndef SIDESTEP_SHIM_H
#define SIDESTEP_SHIM_H

#include <jansson.h>
#include <stdbool.h>

/* CNI error codes (SPEC.md, "Error"); from 100 on they are the plugin's own. */
enum code {
    INCOMPATIBLE_VERSION = 1,
    INVALID_ENVIRONMENT = 4,
    IO_FAILURE = 5,
    DECODE_FAILURE = 6,
    INVALID_CONFIG = 7,
    TRY_AGAIN_LATER = 11,
    NOT_AVAILABLE = 50,
    INVALID_SANDBOX = 101,
    INTERNAL = 999,
};

#define NEWEST_VERSION "1.1.0"
#define SOCKET_NAME "cni.sock" /* in run_dir */

/* One invocation: the runtime's environment, and the configuration from stdin. An unset variable is an empty string. */
struct invocation {
    const char *command;
    const char *container_id;
    const char *netns;
    const char *ifname;
    const char *args;
    const char *path;
    const char *cni_version; /* for error objects: the configuration's, or the newest until that one is checked */
    const char *run_dir;
    double timeout; /* seconds for the whole exchange with the agent, and for ADD to wait for an agent that is away */
    json_t *config;
    int netns_fd; /* -1: none */
};

/* Whether this is DEL or GC. They succeed whatever state the agent is in; it finds out later what it has missed. */
bool always_succeeds(const struct invocation *inv);

/* Print a CNI error object and exit 1. The message is one sentence: the thing, its value, what would be right. */
_Noreturn void fail(const struct invocation *inv, enum code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Like fail(), but DEL and GC print a warning on stderr and exit 0. */
_Noreturn void fail_unless_leaving(const struct invocation *inv, enum code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Print one line on stderr, for people. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Print `output` on stdout. False if it could not be written. */
bool print_json(const json_t *output);

/* A pod that is clearly outside the mesh. What CNI_ARGS does not say is an empty string. */
struct passed {
    const char *namespace;
    const char *name;
    const char *uid;
    const char *reason;
};

/* Whether the pod is clearly outside the mesh, so that ADD and CHECK do nothing. Prints the reason on stderr. */
bool is_none_of_ours(const struct invocation *inv, struct passed *passed);

/* Tell the agent that a pod was let pass, if it takes the message at once. Never waits, and never fails. */
void tell_agent(const struct invocation *inv, const struct passed *passed);

/* A connection to a socket that root serves; -1 if there is none at once. */
int connect_to_root(const char *run_dir, const char *name);

/*
 * For an agent that is away: if istio-cni's serves on this node, end the invocation without doing anything. DEL and GC
 * go on, as they succeed without any agent.
 */
void step_aside_for_istio_cni(const struct invocation *inv);

/* The result of a chained plugin that adds nothing: the previous result, unchanged. */
json_t *unchanged_result(const struct invocation *inv);

/* Ask the agent. Returns its answer, an object with "exit" and "output". If that fails, prints why and exits. */
json_t *ask_agent(const struct invocation *inv);

#endif
