/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the shim's parts share: the invocation (sidestep-cni.c), what needs no agent (policy.c), the exchange (agent.c), how
 * it ends (outcome.c).
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

/* One invocation: the runtime's environment and the configuration it wrote to stdin. Empty strings for what is unset. */
struct invocation {
    const char *command;
    const char *container_id;
    const char *netns;
    const char *ifname;
    const char *args;
    const char *path;
    const char *cni_version; /* for error objects: the configuration's once that is known to be supported */
    const char *run_dir;
    double timeout; /* seconds for the whole exchange with the agent */
    json_t *config;
    int netns_fd; /* -1: none */
};

/* DEL and GC have to succeed whatever state the agent is in; what it misses it finds out by itself later. */
bool always_succeeds(const struct invocation *inv);

/* Print a CNI error object and exit 1. The message is one sentence: the thing, its value, what would be right. */
_Noreturn void fail(const struct invocation *inv, enum code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* As fail(), but for DEL and GC a warning on stderr and exit 0. */
_Noreturn void fail_unless_leaving(const struct invocation *inv, enum code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* One line on stderr, for people. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Print `output` on stdout, nothing else. False if it could not be written. */
bool print_json(const json_t *output);

/* Whether ADD and CHECK of this pod do nothing and need nobody, and DEL hardly anybody; says why on stderr. */
bool is_none_of_ours(const struct invocation *inv);

/* The result of an ADD that adds nothing. */
json_t *unchanged_result(const struct invocation *inv);

/* Send the invocation to the agent and return its answer, an object with "exit" and "output". Does not return on failure. */
json_t *ask_agent(const struct invocation *inv);

#endif
