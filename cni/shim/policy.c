/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decides what needs no agent: which pods are clearly outside the mesh. These pods, and above all the agent's own, must
 * start even if the node's agent is down or hangs, so ADD and CHECK do not ask it; ADD only tells it (tell.c). The rules and their order are those
 * of skip_unseen() in cni/policy/membership.py. The agent decides about all other pods; without it they are refused.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <stdlib.h>
#include <string.h>

/* of the agents' pods: their DaemonSet has Istio's name, or in shadow mode, beside Istio's, another */
static const char *const agent_prefixes[] = {"istio-cni-node-", "sidestep-shadow-node-"};
#define STATUS_ANNOTATION "sidecar.istio.io/status"
/*
 * For this capability containerd (since 1.5, cniNamespaceOpts of its CRI plugin) and CRI-O (since 1.29, newPodNetwork)
 * pass all annotations of the sandbox, at ADD, CHECK and DEL. kubelet gives a sandbox all annotations of its Pod, and
 * adds kubernetes.io/config.source to every Pod (pkg/kubelet/config). So kubelet's pods always come with an object, and
 * the object is complete. If another CRI client sets no annotations, CRI-O passes an empty object, which is complete
 * too, and containerd passes null. null says nothing about the Pod, nor does a missing key (an older runtime).
 */
#define ANNOTATIONS "io.kubernetes.cri.pod-annotations"

struct pod_args {
    char *name;
    char *namespace;
    char *uid;
    bool ignore_unknown;
    bool unknown;
};

static bool is_true(const char *value)
{
    return !strcasecmp(value, "1") || !strcasecmp(value, "true") || !strcasecmp(value, "t");
}

/* Take one KEY=VALUE of CNI_ARGS. If a key comes several times, the last counts. False if it is not KEY=VALUE. */
static bool read_pair(struct pod_args *args, char *pair)
{
    char *value = strchr(pair, '=');

    if (!value)
        return false;
    *value++ = '\0';
    if (!strcmp(pair, "K8S_POD_NAME"))
        args->name = value;
    else if (!strcmp(pair, "K8S_POD_NAMESPACE"))
        args->namespace = value;
    else if (!strcmp(pair, "IgnoreUnknown"))
        args->ignore_unknown = is_true(value);
    else if (!strcmp(pair, "K8S_POD_UID"))
        args->uid = value;
    else if (strcmp(pair, "K8S_POD_INFRA_CONTAINER_ID"))
        args->unknown = true;
    return true;
}

/* Parse CNI_ARGS. False if the agent would refuse them. The strings live as long as the process. */
static bool read_args(const struct invocation *inv, struct pod_args *args)
{
    json_t *text = json_string(inv->args); /* NULL unless it is UTF-8 */
    char *rest = text ? strdup(inv->args) : NULL;
    char *pair;

    if (!rest)
        return false;
    while ((pair = strsep(&rest, ";")))
        if (*pair && !read_pair(args, pair))
            return false;
    return !args->unknown || args->ignore_unknown;
}

/* Whether a JSON value is this string. A string with a NUL in it is not. */
static bool is_text(const json_t *value, const char *text)
{
    return json_is_string(value) && json_string_length(value) == strlen(text)
           && !strcmp(json_string_value(value), text);
}

static bool is_listed(const json_t *names, const char *name)
{
    const json_t *each;
    size_t index;

    json_array_foreach(names, index, each)
        if (is_text(each, name))
            return true;
    return false;
}

static bool is_own_pod(const struct invocation *inv, const struct pod_args *args)
{
    if (!*args->namespace || !is_text(json_object_get(inv->config, "pod_namespace"), args->namespace))
        return false;
    for (size_t index = 0; index < sizeof(agent_prefixes) / sizeof(*agent_prefixes); index++)
        if (!strncmp(args->name, agent_prefixes[index], strlen(agent_prefixes[index])))
            return true;
    return false;
}

/* Whether the runtime passes annotations, and the injector's is not among them. */
static bool is_uninjected(const struct invocation *inv)
{
    json_t *annotations = json_object_get(json_object_get(inv->config, "runtimeConfig"), ANNOTATIONS);
    const char *key;
    json_t *value;

    if (!json_is_object(annotations))
        return false;
    json_object_foreach(annotations, key, value)
        if (!json_is_string(value)) /* then the object is something other than annotations */
            return false;
    return !json_object_get(annotations, STATUS_ANNOTATION);
}

static const char *excluded(const char *namespace)
{
    char *text;

    return asprintf(&text, "namespace %s is in exclude_namespaces", namespace) < 0 ? "out of memory" : text;
}

/* Istio's plugin has this key too. Labels put pods into ambient mode, and the runtime does not pass them. */
static bool is_ambient(const struct invocation *inv)
{
    return json_is_true(json_object_get(inv->config, "ambient_enabled"));
}

/* The words are those of skip_unseen() too, so that the agent knows what it was told before. */
static const char *reason(const struct invocation *inv, const struct pod_args *args)
{
    if (is_own_pod(inv, args))
        return "the agent's own pod";
    if (!*args->name || !*args->namespace)
        return "not a Kubernetes pod";
    if (is_listed(json_object_get(inv->config, "exclude_namespaces"), args->namespace))
        return excluded(args->namespace);
    if (!is_ambient(inv) && is_uninjected(inv))
        return "there is no " STATUS_ANNOTATION " annotation: the injector has not seen the Pod";
    return NULL;
}

bool is_none_of_ours(const struct invocation *inv, struct passed *passed)
{
    struct pod_args args = {.name = "", .namespace = "", .uid = ""};
    const char *why = read_args(inv, &args) ? reason(inv, &args) : NULL;

    *passed = (struct passed){.namespace = args.namespace, .name = args.name, .uid = args.uid, .reason = why};
    if (why)
        note("%s/%s is not captured: %s", args.namespace, args.name, why);
    return why != NULL;
}

json_t *unchanged_result(const struct invocation *inv)
{
    json_t *previous = json_object_get(inv->config, "prevResult");

    return json_is_object(previous) && json_object_size(previous) ? previous
                                                                  : json_pack("{s:s}", "cniVersion", inv->cni_version);
}
