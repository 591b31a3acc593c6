{{/* The targets that this release migrates, as JSON: those of rollout.only, else all. */}}
{{- define "hcm-db-migrations.targets" -}}
{{- $only := (.Values.rollout | default dict).only -}}
{{- $targets := list -}}
{{- range .Values.targets -}}
{{- if or (not $only) (has .name $only) }}{{ $targets = append $targets . }}{{ end -}}
{{- end -}}
{{- toJson $targets -}}
{{- end -}}

{{/* The Jobs of this release, as JSON. Of targets, each Job has a part: "first", the index of its first one in the list, "count",
"maxFailures", and its "suffix", "hookWeight" and "logs": of canaries that succeeded, Helm would print them last. Without targets,
there is one Job and no part. */}}
{{- define "hcm-db-migrations.parts" -}}
{{- $count := include "hcm-db-migrations.targets" . | fromJsonArray | len -}}
{{- $parts := list -}}
{{- if $count -}}
{{- $canary := min .Values.rollout.canary $count | int -}}
{{- $logs := ternary "hook-failed" "" (gt $count $canary) -}}
{{- $weight := include "hcm-db-migrations.hookWeight" . | int -}}
{{- if $canary -}}
{{- $parts = append $parts (dict "first" 0 "count" $canary "maxFailures" 0 "suffix" "-canary" "hookWeight" (sub $weight 1) "logs" $logs) -}}
{{- end -}}
{{- if gt $count $canary -}}
{{- $parts = append $parts (dict "first" $canary "count" (sub $count $canary) "maxFailures" .Values.rollout.maxFailures "suffix" "" "hookWeight" $weight) -}}
{{- end -}}
{{- else -}}
{{- $parts = list dict -}}
{{- end -}}
{{- toJson $parts -}}
{{- end -}}

{{/* The part of helm test, as JSON: all targets; {} without targets. */}}
{{- define "hcm-db-migrations.testPart" -}}
{{- $part := dict -}}
{{- with include "hcm-db-migrations.targets" . | fromJsonArray | len -}}
{{- $part = dict "first" 0 "count" . "maxFailures" nil "hookWeight" (include "hcm-db-migrations.hookWeight" $ | int) "args" (list "current") "expected" "(head)" -}}
{{- end -}}
{{- toJson $part -}}
{{- end -}}

{{/* The Job's hook weight; that of the targets' canary is one less, and that of their ServiceAccount two. */}}
{{- define "hcm-db-migrations.hookWeight" -}}
{{- merge (dict) (.Values.job.annotations | default dict) (.Values.commonAnnotations | default dict) | dig "helm.sh/hook-weight" "0" -}}
{{- end -}}

{{/* Seconds that targets may take if each attempt takes as long as it may: (dict "root" $ "count" <of targets>). Between two
attempts, Kubernetes waits 10 s, 20 s and so on up to 10 minutes, and a pod may have 30 s to stop. */}}
{{- define "hcm-db-migrations.partDeadline" -}}
{{- $job := .root.Values.job -}}
{{- $attempt := add $job.activeDeadlineSeconds 30 -}}
{{- $target := $attempt -}}
{{- $pause := 10 -}}
{{- range until (int $job.backoffLimit) -}}
{{- $target = add $target $pause $attempt -}}
{{- $pause = min 600 (mul 2 $pause) -}}
{{- end -}}
{{- $parallelism := .root.Values.rollout.parallelism | int64 -}}
{{- $rounds := div (add .count $parallelism -1) $parallelism -}}
{{- add (mul $rounds $target) $attempt -}}
{{- end -}}

{{/* Name of the ServiceAccount of the pods, whose token the container "rollout" has. */}}
{{- define "hcm-db-migrations.serviceAccountName" -}}
{{- .Values.serviceAccountName | default (ternary (include "hcm-db-migrations.fullname" . | printf "%s-rollout") "" (not (empty .Values.targets))) -}}
{{- end -}}

{{/* Whether each target has its own retries, which is not so in Kubernetes 1.28. */}}
{{- define "hcm-db-migrations.hasRetriesPerTarget" -}}
{{- if semverCompare ">=1.29-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end -}}

{{/* The targets of the pod's annotation, as JSON: [name, schema, port, [ConfigMap, its keys], [Secret, its keys]]; empty or 0 is what
does not differ from "db". A password of extraEnv takes precedence, as for one database. */}}
{{- define "hcm-db-migrations.targetList" -}}
{{- $db := .Values.db -}}
{{- $hasPassword := false -}}
{{- range .Values.extraEnv }}{{ if eq .name "DB_PASSWORD" }}{{ $hasPassword = true }}{{ end }}{{ end -}}
{{- $targets := list -}}
{{- range include "hcm-db-migrations.targets" . | fromJsonArray -}}
{{- $configMap := list -}}
{{- with .configMap }}{{ $of := merge dict . $db.configMap }}{{ $configMap = list $of.name $of.hostKey $of.nameKey }}{{ end -}}
{{- $secret := list -}}
{{- with .secret }}{{ $of := merge dict . $db.secret }}{{ $secret = list $of.name $of.usernameKey (ternary "" $of.passwordKey $hasPassword) }}{{ end -}}
{{- $targets = append $targets (list .name (.schema | default "") (.port | default 0 | int64) $configMap $secret) -}}
{{- end -}}
{{- toJson $targets -}}
{{- end -}}

{{/* The init container that decides what a pod of a part does: its index's target, or the report, which is the last index. */}}
{{- define "hcm-db-migrations.rolloutContainer" -}}
{{- $part := .part -}}
{{- with .root.Values -}}
- name: rollout
  image: {{ include "hcm-db-migrations.image" .image | quote }}
  imagePullPolicy: {{ .image.pullPolicy }}
  command:
    - python3
    - -I
    - -c
    - |
      {{- $.root.Files.Get "files/rollout.py" | trim | nindent 6 }}
  workingDir: /workspace
  env:
    - {name: NAMESPACE, value: {{ include "hcm-db-migrations.namespace" $.root | quote }}}
    - {name: JOB, valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: FIRST, value: {{ $part.first | int64 | quote }}}
    - {name: COUNT, value: {{ $part.count | int64 | quote }}}
    - {name: MAX_FAILURES, value: {{ kindIs "invalid" $part.maxFailures | ternary "" ($part.maxFailures | int64) | quote }}}
    - {name: SECONDS, value: {{ .job.activeDeadlineSeconds | int64 | quote }}}
  {{- include "hcm-db-migrations.containerSettings" (dict "root" $.root "resources" .resources) | nindent 2 }}
  volumeMounts:
    - {name: workspace, mountPath: /workspace}
    - {name: targets, mountPath: /etc/targets/list, subPath: list, readOnly: true}
    - {name: api, mountPath: /etc/api, readOnly: true}
{{- end -}}
{{- end -}}

{{/* Its volumes: the list of targets and, in a folder of its index, what differs from "db" of each, which is all that the migrate
container of its pod has; and the access to the API, which only the container "rollout" has. */}}
{{- define "hcm-db-migrations.rolloutVolumes" -}}
{{- $part := .part -}}
{{- $objects := dict -}}
{{- $targets := include "hcm-db-migrations.targetList" .root | fromJsonArray -}}
{{- range $index := until (int $part.count) -}}
{{- $target := index $targets (int (add $part.first $index)) -}}
{{- range $from := list (list "configMap" 3 "DB_HOST" "DB_NAME") (list "secret" 4 "DB_USER" "DB_PASSWORD") -}}
{{- with index $target (index $from 1) -}}
{{- $object := printf "%s %s" (first $from) (first .) -}}
{{- range $item := list (list (index . 1) (index $from 2)) (list (index . 2) (index $from 3)) -}}
{{- if first $item -}}
{{- $path := printf "%d/%s" $index (last $item) -}}
{{- $_ := set $objects $object (append (get $objects $object | default list) (dict "key" (first $item) "path" $path)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
- name: targets
  projected:
    sources:
      - downwardAPI:
          items:
            - path: list
              fieldRef: {fieldPath: "metadata.annotations['hcm-db-migrations/targets']"}
      {{- range $object, $items := $objects }}
      - {{ splitList " " $object | first }}:
          name: {{ splitList " " $object | last | quote }}
          optional: true
          items: {{ toJson $items }}
      {{- end }}
- name: api
  projected:
    sources:
      - serviceAccountToken: {path: token}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
{{- end -}}
