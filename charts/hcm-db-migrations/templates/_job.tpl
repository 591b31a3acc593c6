{{/* The Job's spec: deadlines, retries, TTL, and the pod. Its digest is in the Job's name if there is no hook. Of targets, it is the
spec of .part. */}}
{{- define "hcm-db-migrations.jobSpec" -}}
# Longer than the pod's own deadline: this one deletes the pod and its log. With 30 s of grace it is still below Helm's timeout.
{{- if .part }}
activeDeadlineSeconds: {{ include "hcm-db-migrations.partDeadline" (dict "root" . "count" .part.count) }}
completionMode: Indexed
# The last index is the report.
completions: {{ add .part.count 1 }}
parallelism: {{ .Values.rollout.parallelism | int64 }}
{{- if include "hcm-db-migrations.hasRetriesPerTarget" . }}
backoffLimitPerIndex: {{ .Values.job.backoffLimit | int64 }}
{{- else }}
backoffLimit: {{ mul .Values.job.backoffLimit .part.count }}
{{- end }}
{{- else }}
activeDeadlineSeconds: {{ add .Values.job.activeDeadlineSeconds 20 }}
backoffLimit: {{ .Values.job.backoffLimit | int64 }}
{{- end }}
{{- if not (kindIs "invalid" .Values.job.ttlSecondsAfterFinished) }}
ttlSecondsAfterFinished: {{ .Values.job.ttlSecondsAfterFinished | int64 }}
{{- end }}
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
    {{- if .part }}
    # The exit codes of the report: other targets still run after its time, and it starts again; no other target may be started.
    - action: Ignore
      onPodConditions: []
      onExitCodes: {containerName: migrate, operator: In, values: [253]}
    - action: FailJob
      onPodConditions: []
      onExitCodes: {containerName: migrate, operator: In, values: [254]}
    {{- end }}
    # Alembic's exit code for a failure that is not retryable. The schema of Kubernetes 1.28 requires the empty list.
    - action: {{ ternary "FailIndex" "FailJob" (and (not (empty .part)) (eq (include "hcm-db-migrations.hasRetriesPerTarget" .) "true")) }}
      onPodConditions: []
      onExitCodes: {containerName: migrate, operator: In, values: [255]}
template:
  metadata:
    {{- include "hcm-db-migrations.podMetadata" . | nindent 4 }}
  spec:
    {{- include "hcm-db-migrations.jobPodSpec" . | nindent 4 }}
{{- end -}}

{{- define "hcm-db-migrations.jobPodSpec" -}}
{{- $part := .part | default dict -}}
{{- include "hcm-db-migrations.podSpec" (dict "root" . "args" ($part.args | default .Values.args) "expected" $part.expected "part" $part) -}}
{{- end -}}

{{/* sha256 of one of these two: (dict "root" $ "of" "jobSpec"). Without the literals of extraEnv, because everyone who can read
the digest could try out passwords. */}}
{{- define "hcm-db-migrations.digest" -}}
{{- $env := list -}}
{{- range .root.Values.extraEnv }}{{ $env = append $env (omit . "value") }}{{ end -}}
{{- $values := set (omit .root.Values "extraEnv") "extraEnv" $env -}}
{{- $root := set (omit .root "Values") "Values" $values -}}
{{- with include "hcm-db-migrations.parts" $root | fromJsonArray | last }}{{ $_ := set $root "part" . }}{{ end -}}
{{- /* The targets' names, schemas and ports are in the pod's annotations only. */ -}}
{{- $targets := ternary (include "hcm-db-migrations.targetList" $root) "" (not (empty .root.Values.targets)) -}}
{{- printf "%s%s" (include (printf "hcm-db-migrations.%s" .of) $root) $targets | sha256sum -}}
{{- end -}}
