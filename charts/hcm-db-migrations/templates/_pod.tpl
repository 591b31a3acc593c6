{{/* The pod of the Job and of helm test: (dict "root" $ "args" <for Alembic> "expected" <text that Alembic must print> "part" <of the
targets>). */}}
{{- define "hcm-db-migrations.podSpec" -}}
{{- $root := .root -}}
{{- with .root.Values -}}
restartPolicy: Never
# Shorter than the Job's own deadline: it stops the run with SIGTERM and keeps the pod and its log.
activeDeadlineSeconds: {{ .job.activeDeadlineSeconds | int64 }}
terminationGracePeriodSeconds: 30
automountServiceAccountToken: false
# A Service named "db" would set DB_PORT to a URL.
enableServiceLinks: false
{{- with include "hcm-db-migrations.serviceAccountName" (dict "root" $root "part" $.part) }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
initContainers:
  {{- if $.part }}
  {{- include "hcm-db-migrations.rolloutContainer" $ | nindent 2 }}
  {{- end }}
  {{- include "hcm-db-migrations.gitSync" $root | nindent 2 }}
containers:
  - name: migrate
    image: {{ include "hcm-db-migrations.image" .image | quote }}
    imagePullPolicy: {{ .image.pullPolicy }}
    command:
      - sh
      - -c
      - |
        {{- $root.Files.Get "files/migrate.sh" | trim | nindent 8 }}
      - migrate
    args:
      {{- toYaml $.args | nindent 6 }}
    # Not the checkout: a missing working directory would be created, and look like an empty checkout.
    workingDir: /workspace
    env:
      {{- include "hcm-db-migrations.env" (dict "root" $root "expected" $.expected) | nindent 6 }}
    {{- include "hcm-db-migrations.containerSettings" (dict "root" $root "resources" .resources) | nindent 4 }}
    volumeMounts:
      - name: workspace
        mountPath: /workspace
      {{- if $.part }}
      - {name: targets, mountPath: /etc/target, subPathExpr: $(JOB_COMPLETION_INDEX), readOnly: true}
      {{- end }}
      {{- with .extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: workspace
    emptyDir: {{ include "hcm-db-migrations.emptyDir" $root }}
  {{- include "hcm-db-migrations.gitVolume" $root | nindent 2 }}
  {{- if $.part }}
  {{- include "hcm-db-migrations.rolloutVolumes" $ | nindent 2 }}
  {{- end }}
  {{- with .extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $root.Values $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .extraPodSpec }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What each container has: (dict "root" $ "resources" <its own>). */}}
{{- define "hcm-db-migrations.containerSettings" -}}
terminationMessagePolicy: FallbackToLogsOnError
{{- with .root.Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The emptyDir of a volume: at most the greater of the containers' ephemeral-storage limits, if both have one. */}}
{{- define "hcm-db-migrations.emptyDir" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 0x1p10 "Mi" 0x1p20 "Gi" 0x1p30 "Ti" 0x1p40 "Pi" 0x1p50 "Ei" 0x1p60 -}}
{{- $limits := list -}}
{{- range list .Values.resources .Values.git.resources -}}
{{- with get (get (. | default dict) "limits" | default dict) "ephemeral-storage" -}}
{{- $unit := toString . | regexFind "[A-Za-z]+$" -}}
{{- $bytes := mulf (toString . | trimSuffix $unit) (get $units $unit | default 1) -}}
{{- $limits = append $limits (dict "bytes" $bytes "quantity" .) -}}
{{- end -}}
{{- end -}}
{{- if eq (len $limits) 2 -}}
{{- $greater := ternary (first $limits) (last $limits) (gt (first $limits).bytes (last $limits).bytes) -}}
{{- dict "sizeLimit" $greater.quantity | toJson -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Image reference: (dict "repository" "tag" "digest"). */}}
{{- define "hcm-db-migrations.image" -}}
{{- .repository -}}
{{- with .tag }}:{{ . }}{{ end -}}
{{- with .digest }}@{{ . }}{{ end -}}
{{- end -}}
