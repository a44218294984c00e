{{- /*
Everything that depends on the platform, as YAML: a value if the user gave one, else what the platform has, else what
most nodes have. Values of which an empty one means "the platform's" are empty in values.yaml.
*/}}
{{- define "sidestep.placement" -}}
{{- $platform := include "sidestep.platform" . }}
{{- $there := dict }}
{{- if $platform }}{{ $there = .Files.Get (printf "platforms/%s.yaml" $platform) | fromYaml }}{{ end }}
{{- $provider := coalesce .Values.provider $there.provider "default" }}
{{- $multus := eq $provider "multus" }}
{{- $confDir := $multus | ternary "/etc/cni/multus/net.d" (coalesce $there.cniConfDir "/etc/cni/net.d") }}
{{- $chained := kindIs "bool" .Values.chained | ternary .Values.chained (not $multus) }}
{{- $given := .Values.resourceQuotas.enabled }}
{{- $quota := kindIs "bool" $given | ternary $given (and $there.resourceQuota (ne .Release.Namespace "kube-system")) }}
platform: {{ $platform | quote }}
cniBinDir: {{ coalesce .Values.cniBinDir $there.cniBinDir "/opt/cni/bin" | quote }}
cniConfDir: {{ coalesce .Values.cniConfDir $confDir | quote }}
cniNetnsDir: {{ coalesce .Values.cniNetnsDir $there.cniNetnsDir "/var/run/netns" | quote }}
cniConfFileName: {{ .Values.cniConfFileName | default ($multus | ternary "istio-cni.conf" "") | quote }}
multus: {{ $multus }}
chained: {{ $chained }}
resourceQuota: {{ $quota | default false }}
seLinuxOptions: {{ coalesce .Values.seLinuxOptions $there.seLinuxOptions | default dict | toJson }}
scc: {{ $there.scc | default false }}
{{- end }}

{{- /* The platform: as given, or GKE if the API server says that it is one. */}}
{{- define "sidestep.platform" -}}
{{- $found := contains "-gke" .Capabilities.KubeVersion.Version | ternary "gke" "" }}
{{- coalesce .Values.platform .Values.global.platform $found | default "" }}
{{- end }}

{{- /* The image: one with a slash in it as it is, as in Istio's chart; else HUB/IMAGE:TAG. */}}
{{- define "sidestep.image" -}}
{{- if contains "/" .Values.image }}
{{- .Values.image }}
{{- else }}
{{- $hub := coalesce .Values.hub .Values.global.hub }}
{{- $tag := coalesce .Values.tag .Values.global.tag .Chart.AppVersion }}
{{- if $hub }}{{ $hub }}/{{ end }}{{ .Values.image }}:{{ $tag }}
{{- end }}
{{- end }}

{{- /*
The name of the objects. Istio's, because istiod, istioctl and the plugin know it; but shadow mode runs beside istio-cni,
whose objects have that name already. The DaemonSet and its pods' label k8s-app have sidestep.daemonset.
*/}}
{{- define "sidestep.name" -}}
{{ if .Values.shadow }}sidestep-shadow{{ else }}istio-cni{{ end }}
{{- end }}
{{- define "sidestep.daemonset" -}}
{{ include "sidestep.name" . }}-node
{{- end }}

{{- /* Labels of every object. Never those by which istioctl prunes: operator.istio.io/component and owning-resource. */}}
{{- define "sidestep.labels" -}}
app: {{ include "sidestep.name" . }}
app.kubernetes.io/name: sidestep
app.kubernetes.io/part-of: istio
{{- with .Values.revision }}
istio.io/rev: {{ . | quote }}
{{- end }}
{{- end }}

{{- /* "true" if objects of this scope (namespace or cluster) are to be rendered: global.resourceScope. */}}
{{- define "sidestep.renders" -}}
{{- if has (index . 0).Values.global.resourceScope (list "all" (index . 1)) }}true{{ end }}
{{- end }}
