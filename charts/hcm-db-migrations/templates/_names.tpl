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
