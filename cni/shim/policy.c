/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What needs no agent: pods that are none of the mesh's business whatever their Pod says. They must start on a node whose
 * agent is down, the agent's own pod first of all. The rules and their order are those of cni/membership.py; everything
 * that isn't plainly one of these cases is the agent's to decide, and refused without it.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <stdlib.h>
#include <string.h>

#define AGENT_PREFIX "istio-cni-node-"
#define STATUS_ANNOTATION "sidecar.istio.io/status"
/*
 * containerd passes all annotations of the sandbox under this capability since 1.5, CRI-O since 1.29. kubelet gives every
 * sandbox some of its own (kubernetes.io/config.source), so an object is always complete, and null (a CRI client
 * that set none) or nothing (an older runtime) says nothing about the Pod.
 */
#define ANNOTATIONS "io.kubernetes.cri.pod-annotations"

struct pod_args {
    char *name;
    char *namespace;
    bool ignore_unknown;
    bool unknown;
};

static bool is_true(const char *value)
{
    return !strcasecmp(value, "1") || !strcasecmp(value, "true") || !strcasecmp(value, "t");
}

/* One KEY=VALUE of CNI_ARGS; of several with one key the last counts. False if it is none. */
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
    else if (strcmp(pair, "K8S_POD_UID") && strcmp(pair, "K8S_POD_INFRA_CONTAINER_ID"))
        args->unknown = true;
    return true;
}

/* False for what the agent would refuse. The strings live as long as the process. */
static bool read_args(const struct invocation *inv, struct pod_args *args)
{
    char *rest = strdup(inv->args);
    char *pair;

    if (!rest)
        return false;
    while ((pair = strsep(&rest, ";")))
        if (*pair && !read_pair(args, pair))
            return false;
    return !args->unknown || args->ignore_unknown;
}

static bool is_listed(const json_t *names, const char *name)
{
    const json_t *each;
    size_t index;

    json_array_foreach(names, index, each)
        if (json_is_string(each) && json_string_length(each) == strlen(name) && !strcmp(json_string_value(each), name))
            return true;
    return false;
}

static bool is_own_pod(const struct invocation *inv, const struct pod_args *args)
{
    const char *namespace = json_string_value(json_object_get(inv->config, "pod_namespace"));

    return namespace && *namespace && !strcmp(args->namespace, namespace) &&
           !strncmp(args->name, AGENT_PREFIX, strlen(AGENT_PREFIX));
}

static const char *reason(const struct invocation *inv, const struct pod_args *args)
{
    const json_t *annotations = json_object_get(json_object_get(inv->config, "runtimeConfig"), ANNOTATIONS);

    if (is_own_pod(inv, args))
        return "the agent's own pod";
    if (!*args->name || !*args->namespace)
        return "not a Kubernetes pod";
    if (is_listed(json_object_get(inv->config, "exclude_namespaces"), args->namespace))
        return "its namespace is in exclude_namespaces";
    if (json_is_object(annotations) && !json_object_get(annotations, STATUS_ANNOTATION))
        return "there is no " STATUS_ANNOTATION " annotation: the injector has not seen the Pod";
    return NULL;
}

bool is_none_of_ours(const struct invocation *inv)
{
    struct pod_args args = {.name = "", .namespace = ""};
    const char *why = read_args(inv, &args) ? reason(inv, &args) : NULL;

    if (why)
        note("%s/%s is not captured: %s", args.namespace, args.name, why);
    return why != NULL;
}

/* What a chained plugin that adds nothing prints: the previous result, unchanged. */
json_t *unchanged_result(const struct invocation *inv)
{
    json_t *previous = json_object_get(inv->config, "prevResult");

    return json_is_object(previous) && json_object_size(previous) ? previous
                                                                  : json_pack("{s:s}", "cniVersion", inv->cni_version);
}
