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

{{/* "true" if Argo CD renders the chart: it runs `helm template` and passes the API versions and kinds of the target cluster. Helm's
built-in list has extensions/v1beta1 but no kinds, a live cluster has kinds but no extensions/v1beta1. */}}
{{- define "hcm-db-migrations.byArgoCD" -}}
{{- $apis := .Capabilities.APIVersions -}}
{{- if and ($apis.Has "batch/v1/Job") ($apis.Has "extensions/v1beta1") }}true{{ end -}}
{{- end -}}

{{/* Name of the Job. An ordinary Job is immutable, so it gets a new name exactly when its spec changes; so does Argo CD's, to which
every release has revision 1: the next commit keeps a failed Job and its log. */}}
{{- define "hcm-db-migrations.jobName" -}}
{{- $suffix := toString (int64 .Release.Revision) -}}
{{- if or (not .Values.hook) (include "hcm-db-migrations.byArgoCD" .) -}}
{{- $suffix = include "hcm-db-migrations.digest" (dict "root" . "of" "jobSpec") | trunc 8 -}}
{{- end -}}
{{- printf "%s-%s" (include "hcm-db-migrations.fullname" .) $suffix -}}
{{- end -}}

{{- define "hcm-db-migrations.namespace" -}}
{{- .Values.namespace | default .Release.Namespace -}}
{{- end -}}

{{/* Name of the Pod, or with targets the Job, of helm test. */}}
{{- define "hcm-db-migrations.testName" -}}
{{- include "hcm-db-migrations.fullname" . | printf "%s-test" -}}
{{- end -}}
