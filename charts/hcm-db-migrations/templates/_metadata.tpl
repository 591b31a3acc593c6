{{/* Labels of every object: the chart's own take precedence. The first two are for the selector of a NetworkPolicy. */}}
{{- define "hcm-db-migrations.labels" -}}
{{- $own := include "hcm-db-migrations.ownLabels" . | fromYaml -}}
{{- merge $own (.Values.commonLabels | default dict) | toYaml -}}
{{- end -}}

{{- define "hcm-db-migrations.ownLabels" -}}
app.kubernetes.io/name: hcm-db-migrations
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{- end -}}

{{/* Labels and annotations of the pod: the chart's own take precedence, then those of the pod. */}}
{{- define "hcm-db-migrations.podMetadata" -}}
labels:
  {{- $own := include "hcm-db-migrations.ownLabels" . | fromYaml }}
  {{- merge $own (.Values.podLabels | default dict) (.Values.commonLabels | default dict) | toYaml | nindent 2 }}
annotations:
  {{- $own = dict "kubectl.kubernetes.io/default-container" "migrate" "hcm-db-migrations/sparse-checkout" (include "hcm-db-migrations.sparseCheckout" .) }}
  {{- if .Values.targets }}{{ $_ := set $own "hcm-db-migrations/targets" (include "hcm-db-migrations.targetList" .) }}{{ end }}
  {{- merge $own (.Values.podAnnotations | default dict) (.Values.commonAnnotations | default dict) | toYaml | nindent 2 }}
{{- end -}}

{{/* Annotations of a hook: (dict "root" $ "hook" <its events> "logs" <when Helm prints the log>). A failed Job and its log are kept until the TTL expires: the
next Job has another name. */}}
{{- define "hcm-db-migrations.hookAnnotations" -}}
helm.sh/hook: {{ .hook | quote }}
{{- /* Argo CD would delete the Job of a failed sync when it retries it, and after its controller was restarted a running one. */}}
helm.sh/hook-delete-policy: {{ if not (include "hcm-db-migrations.byArgoCD" .root) }}before-hook-creation,{{ end }}hook-succeeded
{{- /* Flux's helm-controller (1.6.3 and older) crashes on it. Helm's version has three numbers in Helm's own program, which
prints the log, and two (v4.3) in a program that embeds Helm. */}}
{{- if regexMatch "^v[0-9]+[.][0-9]+[.][0-9]+" .root.Capabilities.HelmVersion.Version }}
helm.sh/hook-output-log-policy: {{ .logs | default "hook-succeeded,hook-failed" }}
{{- end }}
{{- end -}}
