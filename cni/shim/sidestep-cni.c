/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sidestep-cni: the CNI plugin that the container runtime executes, last in the chain.
 *
 * It checks the invocation and opens the pod's network namespace. It lets pods start that are clearly outside the mesh,
 * and tells the agent of them.
 * For all others it passes the invocation and the namespace to the agent, and prints the agent's answer.
 *
 * It is linked statically and needs no shell and no files of its own, so it runs on any host. stdout gets the result or
 * a CNI error object, and nothing else. stderr is for people.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#define NSFS_MAGIC 0x6e736673 /* linux/magic.h */
#define MAX_STDIN (1u << 20)
#define MAX_CONTAINER_ID 128
#define MAX_IFNAME 15 /* IFNAMSIZ less the NUL */
#define DEFAULT_RUN_DIR "/run/sidestep"
#define DEFAULT_TIMEOUT 10.0
#define MAX_TIMEOUT 600.0
#define LEAVING_TIMEOUT 1.0 /* seconds, for DEL of a pod outside the mesh: worth telling the agent, not worth waiting */
#define MAX_SHOWN 80        /* characters of a value in a message */

static const char *const versions[] = {"0.3.1", "0.4.0", "1.0.0", "1.1.0"};
#define VERSIONS (sizeof(versions) / sizeof(versions[0]))

/* The commands: since which version each exists (an index into versions), and which variables it needs. */
static const struct verb {
    const char *name;
    size_t since;
    bool attachment; /* CNI_CONTAINERID and CNI_IFNAME */
    bool netns;      /* CNI_NETNS */
    bool path;       /* CNI_PATH */
} verbs[] = {
    {"ADD", 0, true, true, true},      {"DEL", 0, true, false, true}, {"CHECK", 1, true, true, true},
    {"STATUS", 3, false, false, true}, {"GC", 3, false, false, true}, {"VERSION", 0, false, false, false},
};

static const char *variable(const char *name)
{
    const char *value = getenv(name);

    return value ? value : "";
}

static const struct verb *verb_of(const struct invocation *inv)
{
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
        if (!strcmp(inv->command, verbs[i].name))
            return &verbs[i];
    if (!*inv->command)
        fail(inv, INVALID_ENVIRONMENT, "CNI_COMMAND is not set; give ADD, DEL, CHECK, STATUS, GC or VERSION");
    fail(inv, INVALID_ENVIRONMENT, "CNI_COMMAND \"%s\" is unknown; give ADD, DEL, CHECK, STATUS, GC or VERSION",
         inv->command);
}

static void check_container_id(const struct invocation *inv)
{
    const char *id = inv->container_id;
    bool good = isalnum((unsigned char)id[0]) && strlen(id) <= MAX_CONTAINER_ID;

    for (const char *c = id; *c; c++)
        good = good && (isalnum((unsigned char)*c) || strchr("_.-", *c));
    if (!good)
        fail(inv, INVALID_ENVIRONMENT,
             "CNI_CONTAINERID \"%s\" is invalid; give at most %d letters, digits, '_', '.' or '-', "
             "a letter or digit first",
             id, MAX_CONTAINER_ID);
}

static void check_ifname(const struct invocation *inv)
{
    const char *name = inv->ifname;
    bool good = strlen(name) <= MAX_IFNAME && strcmp(name, ".") && strcmp(name, "..");

    for (const char *c = name; *c; c++)
        good = good && *c != '/' && *c != ':' && !isspace((unsigned char)*c);
    if (!good)
        fail(inv, INVALID_ENVIRONMENT,
             "CNI_IFNAME \"%s\" is no interface name; give at most %d bytes without '/', ':' and spaces", name,
             MAX_IFNAME);
}

static void check_environment(const struct invocation *inv, const struct verb *verb)
{
    char missing[128] = "";

    if (verb->attachment && !*inv->container_id)
        strcat(missing, " CNI_CONTAINERID");
    if (verb->netns && !*inv->netns)
        strcat(missing, " CNI_NETNS");
    if (verb->attachment && !*inv->ifname)
        strcat(missing, " CNI_IFNAME");
    if (verb->path && !*inv->path)
        strcat(missing, " CNI_PATH");
    if (*missing)
        fail(inv, INVALID_ENVIRONMENT, "%s needs environment variables that are not set:%s", verb->name, missing);
    if (verb->attachment) {
        check_container_id(inv);
        check_ifname(inv);
    }
}

/* Read all of stdin. The room for one byte more than allowed shows whether there is too much. */
static char *read_stdin(const struct invocation *inv, size_t *size)
{
    char *text = malloc(MAX_STDIN + 1);

    if (!text)
        fail(inv, INTERNAL, "out of memory");
    for (*size = 0; *size <= MAX_STDIN;) {
        ssize_t got = read(STDIN_FILENO, text + *size, MAX_STDIN + 1 - *size);

        if (got == 0)
            return text;
        if (got < 0 && errno != EINTR)
            fail(inv, IO_FAILURE, "cannot read the configuration from stdin: %s", strerror(errno));
        if (got > 0)
            *size += (size_t)got;
    }
    fail(inv, DECODE_FAILURE, "the configuration on stdin is longer than %u bytes", MAX_STDIN);
}

static json_t *read_config(const struct invocation *inv)
{
    json_error_t error;
    json_t *config;
    size_t size;
    char *text = read_stdin(inv, &size);

    if (size == 0)
        fail(inv, DECODE_FAILURE, "stdin is empty; it must be the plugin's configuration, a JSON object");
    config = json_loadb(text, size, JSON_ALLOW_NUL | JSON_DECODE_ANY, &error);
    if (!config)
        fail(inv, DECODE_FAILURE, "the configuration on stdin is not JSON: line %d, column %d: %s", error.line,
             error.column, error.text);
    if (!json_is_object(config))
        fail(inv, DECODE_FAILURE, "the configuration on stdin is JSON, but not an object");
    return config;
}

/* The text of a JSON string. NULL if it is not a string, or has a NUL, which would end it here but not in the agent. */
static const char *text_of(const json_t *value)
{
    const char *text = json_string_value(value);

    return text && strlen(text) == json_string_length(value) ? text : NULL;
}

/* A value as messages quote it; escaped to ASCII, so that cutting it splits no character. */
static const char *shown(const json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_ENSURE_ASCII);

    if (text && strlen(text) > MAX_SHOWN)
        strcpy(text + MAX_SHOWN - 3, "...");
    return text ? text : "missing";
}

static const char *required_string(const struct invocation *inv, const char *key)
{
    const json_t *value = json_object_get(inv->config, key);
    const char *text = text_of(value);

    if (!text || !*text)
        fail(inv, INVALID_CONFIG, "\"%s\" is %s in the configuration; give a non-empty string", key, shown(value));
    return text;
}

static void check_version(struct invocation *inv, const struct verb *verb)
{
    const char *version = required_string(inv, "cniVersion");
    size_t index = 0;

    while (index < VERSIONS && strcmp(version, versions[index]))
        index++;
    if (index == VERSIONS)
        fail(inv, INCOMPATIBLE_VERSION, "cniVersion \"%s\" is not supported; give 0.3.1, 0.4.0, 1.0.0 or 1.1.0",
             version);
    inv->cni_version = versions[index];
    if (index < verb->since)
        fail(inv, INCOMPATIBLE_VERSION, "%s needs cniVersion %s or newer, the configuration has %s", verb->name,
             versions[verb->since], version);
}

static void read_options(struct invocation *inv)
{
    const json_t *run_dir = json_object_get(inv->config, "cni_agent_run_dir");
    const json_t *timeout = json_object_get(inv->config, "agent_timeout_seconds");

    inv->run_dir = run_dir ? text_of(run_dir) : DEFAULT_RUN_DIR;
    if (!inv->run_dir || inv->run_dir[0] != '/')
        fail(inv, INVALID_CONFIG, "cni_agent_run_dir is %s; give an absolute path", shown(run_dir));
    inv->timeout = timeout ? json_number_value(timeout) : DEFAULT_TIMEOUT;
    if (inv->timeout <= 0 || inv->timeout > MAX_TIMEOUT)
        fail(inv, INVALID_CONFIG, "agent_timeout_seconds is %s; give a number above 0 and at most %g", shown(timeout),
             MAX_TIMEOUT);
}

/* Open the pod's network namespace, because the agent needs a descriptor. At DEL it may be gone already: then -1. */
static int open_netns(const struct invocation *inv, const struct verb *verb)
{
    struct statfs filesystem;
    const char *why = NULL;
    int fd = open(inv->netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        why = strerror(errno);
    else if (fstatfs(fd, &filesystem) < 0 || filesystem.f_type != NSFS_MAGIC
             || ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNET)
        why = "it is no network namespace";
    if (!why)
        return fd;
    if (verb->netns)
        fail(inv, INVALID_SANDBOX, "CNI_NETNS \"%s\": %s", inv->netns, why);
    return -1;
}

/* VERSION does not check stdin: a runtime may send {"cniVersion": …} or nothing. */
static _Noreturn void print_version(void)
{
    json_t *config = json_loadf(stdin, 0, NULL);
    json_t *supported = json_array();
    const char *asked = json_string_value(json_object_get(config, "cniVersion"));

    for (size_t i = 0; i < VERSIONS; i++)
        json_array_append_new(supported, json_string(versions[i]));
    exit(!print_json(
        json_pack("{s:s, s:o}", "cniVersion", asked ? asked : NEWEST_VERSION, "supportedVersions", supported)));
}

static int print_answer(const struct invocation *inv, const json_t *answer)
{
    const json_t *output = json_object_get(answer, "output");
    const char *message = json_string_value(json_object_get(output, "msg"));

    if (json_integer_value(json_object_get(answer, "exit")) == 0)
        return json_is_object(output) && !print_json(output);
    if (always_succeeds(inv))
        fail_unless_leaving(inv, INTERNAL, "the agent failed: %s", message ? message : "no message");
    note("%s", message ? message : "the agent refused");
    print_json(output);
    return 1;
}

int main(void)
{
    struct invocation inv = {
        .command = variable("CNI_COMMAND"),
        .container_id = variable("CNI_CONTAINERID"),
        .netns = variable("CNI_NETNS"),
        .ifname = variable("CNI_IFNAME"),
        .args = variable("CNI_ARGS"),
        .path = variable("CNI_PATH"),
        .cni_version = NEWEST_VERSION,
        .netns_fd = -1,
    };
    const struct verb *verb;
    struct passed passed;

    signal(SIGPIPE, SIG_IGN);
    verb = verb_of(&inv);
    if (!strcmp(verb->name, "VERSION"))
        print_version();
    check_environment(&inv, verb);
    inv.config = read_config(&inv);
    check_version(&inv, verb);
    required_string(&inv, "name");
    required_string(&inv, "type");
    read_options(&inv);
    if (verb->attachment)
        inv.netns_fd = open_netns(&inv, verb);

    if (verb->attachment && is_none_of_ours(&inv, &passed)) {
        if (!strcmp(verb->name, "ADD")) {
            bool printed = print_json(unchanged_result(&inv));

            tell_agent(&inv, &passed);
            return !printed;
        }
        if (!strcmp(verb->name, "CHECK"))
            return 0;
        if (inv.timeout > LEAVING_TIMEOUT) /* DEL: tell the agent, as other settings at ADD may have enrolled the pod */
            inv.timeout = LEAVING_TIMEOUT;
    }
    return print_answer(&inv, ask_agent(&inv));
}
