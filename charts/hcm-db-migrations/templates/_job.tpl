{{/* The Job's spec: deadlines, retries, TTL, and the pod. Its digest is in the Job's name if there is no hook. */}}
{{- define "hcm-db-migrations.jobSpec" -}}
# Longer than the pod's own deadline: this one deletes the pod and its log. With 30 s of grace it is still below Helm's timeout.
activeDeadlineSeconds: {{ add .Values.job.activeDeadlineSeconds 20 }}
backoffLimit: {{ .Values.job.backoffLimit | int64 }}
{{- if not (kindIs "invalid" .Values.job.ttlSecondsAfterFinished) }}
ttlSecondsAfterFinished: {{ .Values.job.ttlSecondsAfterFinished | int64 }}
{{- end }}
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
    # Alembic's exit code for a failure that is not retryable. The schema of Kubernetes 1.28 requires the empty list.
    - action: FailJob
      onPodConditions: []
      onExitCodes: {containerName: migrate, operator: In, values: [255]}
template:
  metadata:
    {{- include "hcm-db-migrations.podMetadata" . | nindent 4 }}
  spec:
    {{- include "hcm-db-migrations.jobPodSpec" . | nindent 4 }}
{{- end -}}

{{- define "hcm-db-migrations.jobPodSpec" -}}
{{- include "hcm-db-migrations.podSpec" (dict "root" . "args" .Values.args) -}}
{{- end -}}

{{/* sha256 of one of these two: (dict "root" $ "of" "jobSpec"). Without the literals of extraEnv, because everyone who can read
the digest could try out passwords. */}}
{{- define "hcm-db-migrations.digest" -}}
{{- $env := list -}}
{{- range .root.Values.extraEnv }}{{ $env = append $env (omit . "value") }}{{ end -}}
{{- $values := set (omit .root.Values "extraEnv") "extraEnv" $env -}}
{{- include (printf "hcm-db-migrations.%s" .of) (set (omit .root "Values") "Values" $values) | sha256sum -}}
{{- end -}}
