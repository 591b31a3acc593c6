{{/* Name of all objects, without the Job's number. It contains the release name, unless that is the default one: two
releases with the same Job name would delete each other's running Job. At most 53 characters, as a release name, so that
a number can be appended. */}}
{{- define "hcm-db-migrations.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if eq .Release.Name "hcm-db-migrations" -}}
hcm-db-migration
{{- else -}}
{{- printf "%s-hcm-db-migration" .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of the Job. An ordinary Job is immutable, so it gets a new name exactly when its spec changes. */}}
{{- define "hcm-db-migrations.jobName" -}}
{{- if .Values.hook -}}
{{- printf "%s-%d" (include "hcm-db-migrations.fullname" .) (int64 .Release.Revision) -}}
{{- else -}}
{{- printf "%s-%s" (include "hcm-db-migrations.fullname" .) (include "hcm-db-migrations.digest" (dict "root" . "of" "jobSpec") | trunc 8) -}}
{{- end -}}
{{- end -}}

{{- define "hcm-db-migrations.namespace" -}}
{{- .Values.namespace | default .Release.Namespace -}}
{{- end -}}

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

{{/* Image reference: (dict "repository" "tag" "digest"). */}}
{{- define "hcm-db-migrations.image" -}}
{{- .repository -}}
{{- with .tag }}:{{ . }}{{ end -}}
{{- with .digest }}@{{ . }}{{ end -}}
{{- end -}}
