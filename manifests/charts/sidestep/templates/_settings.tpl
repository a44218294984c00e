{{- /*
Every setting of the agent by its environment variable, as YAML; `sidestep agent --help` explains each. Empty means the
agent's default. KUBERNETES_NODE_NAME and POD_NAMESPACE come from the pod itself. `env` replaces what the chart says.
*/}}
{{- define "sidestep.settings" -}}
{{- $place := include "sidestep.placement" . | fromYaml }}
{{- $repair := .Values.repair }}
{{- $uncaptured := .Values.uncaptured | default dict }}
{{- $settings := dict
  "SIDESTEP_BPFFS" "/sys/fs/bpf"
  "SIDESTEP_CGROUP" ""
  "CNI_AGENT_RUN_DIR" "/run/sidestep"
  "SIDESTEP_AGENT_TIMEOUT_SECONDS" .Values.agentTimeoutSeconds
  "SIDESTEP_DAEMONSET" (include "sidestep.daemonset" .)
  "SIDESTEP_PODS" ""
  "SIDESTEP_KUBECONFIG" ""
  "KUBE_CA_FILE" ""
  "SKIP_TLS_VERIFY" "false"
  "EXCLUDE_NAMESPACES" (join "," .Values.excludeNamespaces)
  "AMBIENT_ENABLED" .Values.ambient.enabled
  "AMBIENT_ENABLEMENT_SELECTOR" (.Values.ambient.enablementSelectors | default list | empty | ternary "" (.Values.ambient.enablementSelectors | toYaml))
  "AMBIENT_DNS_CAPTURE" .Values.ambient.dnsCapture
  "AMBIENT_IPV6" .Values.ambient.ipv6
  "ZTUNNEL_UDS_ADDRESS" "/var/run/ztunnel/ztunnel.sock"
  "SYSTEM_NAMESPACE" .Release.Namespace
  "SIDESTEP_PROC" "/host/proc"
  "SIDESTEP_INSTALL" "true"
  "MOUNTED_CNI_BIN_DIR" "/host/opt/cni/bin"
  "MOUNTED_CNI_NET_DIR" "/host/etc/cni/net.d"
  "CNI_CONF_NAME" $place.cniConfFileName
  "CHAINED_CNI_PLUGIN" $place.chained
  "ISTIO_OWNED_CNI_CONFIG" .Values.istioOwnedCNIConfig
  "ISTIO_OWNED_CNI_CONFIG_FILENAME" .Values.istioOwnedCNIConfigFileName
  "CNI_CONF_GROUP_READ" "false"
  "SIDESTEP_SHIM" "/opt/cni/bin/sidestep-cni"
  "REPAIR_ENABLED" $repair.enabled
  "REPAIR_REPAIR_PODS" $repair.repairPods
  "REPAIR_DELETE_PODS" $repair.deletePods
  "REPAIR_LABEL_PODS" $repair.labelPods
  "REPAIR_BROKEN_POD_LABEL_KEY" $repair.brokenPodLabelKey
  "REPAIR_BROKEN_POD_LABEL_VALUE" $repair.brokenPodLabelValue
  "REPAIR_SIDECAR_ANNOTATION" "sidecar.istio.io/status"
  "REPAIR_INIT_CONTAINER_NAME" $repair.initContainerName
  "REPAIR_INIT_CONTAINER_EXIT_CODE" "126"
  "REPAIR_INIT_CONTAINER_TERMINATION_MESSAGE" ""
  "REPAIR_LABEL_SELECTORS" ""
  "REPAIR_FIELD_SELECTORS" ""
  "SIDESTEP_RECONCILE_SECONDS" .Values.reconcileSeconds
  "SIDESTEP_ACCELERATION" .Values.acceleration
  "SIDESTEP_UNCAPTURED" $uncaptured.default
  "SIDESTEP_UNCAPTURED_EXEMPT_NAMESPACES" (join "," ($uncaptured.exemptNamespaces | default list))
  "SIDESTEP_UNCAPTURED_EVENTS" $uncaptured.events
  "SIDESTEP_LIVE_POLICY" .Values.livePolicy
  "SIDESTEP_SHADOW" .Values.shadow
  "MONITORING_PORT" "15014"
  "SIDESTEP_HEALTH_PORT" "8000"
  "LOG_LEVEL" (coalesce .Values.logging.level .Values.global.logging.level)
  "LOG_AS_JSON" .Values.global.logAsJson
}}
{{- /* Not settings, but read by commands: docs/kernels.md, docs/cli.md, docs/operations.md. */}}
{{- $further := list "SIDESTEP_LACKING" "SIDESTEP_DEBUG" "SIDESTEP_BYTECODE" }}
{{- range $name, $value := .Values.env }}
{{- if and (not (has $name $further)) (or (hasPrefix "SIDESTEP_" $name) (hasPrefix "REPAIR_" $name)) (not (hasKey $settings $name)) }}
{{- fail (printf "\n\nenv: %s is no setting of the agent; `sidestep agent --help` lists those that are.\n" $name) }}
{{- end }}
{{- if has $name (list "KUBERNETES_NODE_NAME" "POD_NAMESPACE") }}
{{- fail (printf "\n\nenv: %s comes from the pod itself; leave it out.\n" $name) }}
{{- end }}
{{- if has $name (list "SIDESTEP_DAEMONSET" "SIDESTEP_SHADOW") }}
{{- fail (printf "\n\nenv: %s goes with the names of the objects; set the value shadow instead.\n" $name) }}
{{- end }}
{{- $_ := set $settings $name $value }}
{{- end }}
{{- $settings | toYaml }}
{{- end }}
