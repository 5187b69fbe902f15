{{- define "layercast.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a component: (list . "gateway"). The operator is told the same labels. */}}
{{- define "layercast.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: layercast
app.kubernetes.io/instance: {{ $root.Release.Name | trunc 63 }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "layercast.selectorFlag" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name=layercast,app.kubernetes.io/instance={{ $root.Release.Name | trunc 63 }},app.kubernetes.io/component={{ index . 1 }}
{{- end -}}

{{- define "layercast.labels" -}}
{{- $root := index . 0 -}}
{{ include "layercast.selector" . }}
app.kubernetes.io/part-of: layercast
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "layercast.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.image.repository }}/layercast-{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end -}}

{{/* Of every container of ours: Pod Security's `restricted`. Root files are read-only; /tmp is a volume. */}}
{{- define "layercast.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "layercast.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* What of a pod is the same everywhere: (list . $values). */}}
{{- define "layercast.scheduling" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Pods of one component prefer different nodes. */}}
{{- define "layercast.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{ include "layercast.selector" . | nindent 12 }}
{{- end -}}

{{- define "layercast.tls" -}}{{ ne .Values.certificates.mode "off" }}{{- end -}}

{{- define "layercast.tlsSecret" -}}
{{ include "layercast.fullname" (index . 0) }}-{{ index . 1 }}-tls
{{- end -}}

{{- define "layercast.dataTokenSecret" -}}
{{ .Values.dataToken.existingSecret | default (printf "%s-data-token" (include "layercast.fullname" .)) }}
{{- end -}}

{{- define "layercast.apiKeysSecret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "layercast.fullname" .)) }}
{{- end -}}

{{- define "layercast.operatorAddress" -}}
{{ include "layercast.fullname" . }}-operator.{{ .Release.Namespace }}.svc:{{ .Values.operator.ports.routes }}
{{- end -}}

{{- define "layercast.pdbVersion" -}}
{{ .Capabilities.APIVersions.Has "policy/v1" | ternary "policy/v1" "policy/v1beta1" }}
{{- end -}}

{{/* Takes CEL rules out of a schema, in place. */}}
{{- define "layercast.withoutRules" -}}
{{- $_ := unset . "x-kubernetes-validations" -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value -}}
{{- include "layercast.withoutRules" $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether the definition is there and another release, or nobody, looks after it: kept after an uninstall, or a second
installation in this cluster. Helm would refuse to take it over. */}}
{{- define "layercast.foreignCrd" -}}
{{- $there := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" "modelservices.layercast.dev" -}}
{{- $notes := dig "metadata" "annotations" dict ($there | default dict) -}}
{{- $owner := printf "%s/%s" (index $notes "meta.helm.sh/release-namespace") (index $notes "meta.helm.sh/release-name") -}}
{{- and (not (empty $there)) (ne $owner (printf "%s/%s" .Release.Namespace .Release.Name)) -}}
{{- end -}}
