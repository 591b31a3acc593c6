{{/* The targets that this release migrates, as JSON: those of rollout.only, else all. Of a part with "all", all. */}}
{{- define "hcm-db-migrations.targets" -}}
{{- $only := ternary list (.Values.rollout | default dict).only (hasKey (.part | default dict) "all") -}}
{{- $targets := list -}}
{{- range .Values.targets -}}
{{- if or (not $only) (has .name $only) }}{{ $targets = append $targets . }}{{ end -}}
{{- end -}}
{{- toJson $targets -}}
{{- end -}}

{{- define "hcm-db-migrations.targetCount" -}}
{{- include "hcm-db-migrations.targets" . | fromJsonArray | len -}}
{{- end -}}

{{/* The Jobs of this release, as JSON. Of targets, each Job has a part: "first", the index of its first one in the list, "count",
"maxFailures", the "suffix" of its name, its "order" among the hooks, and "logs", Helm's log policy: only after a failure for
canaries, whose log Helm would print last. Without targets, there is one Job and no part. */}}
{{- define "hcm-db-migrations.parts" -}}
{{- $count := include "hcm-db-migrations.targetCount" . | int -}}
{{- $parts := list -}}
{{- if $count -}}
{{- $canary := min .Values.rollout.canary $count | int -}}
{{- $last := dict "first" 0 "count" $count "maxFailures" 0 "order" 0 -}}
{{- if lt $canary $count -}}
{{- if $canary -}}
{{- $parts = append $parts (dict "first" 0 "count" $canary "maxFailures" 0 "suffix" "-canary" "order" -1 "logs" "hook-failed") -}}
{{- end -}}
{{- $last = dict "first" $canary "count" (sub $count $canary) "maxFailures" .Values.rollout.maxFailures "order" 0 -}}
{{- end -}}
{{- $parts = append $parts $last -}}
{{- else -}}
{{- $parts = list dict -}}
{{- end -}}
{{- toJson $parts -}}
{{- end -}}

{{/* The part of helm test, as JSON: all targets; {} without targets. */}}
{{- define "hcm-db-migrations.testPart" -}}
{{- $part := dict -}}
{{- with len (.Values.targets | default list) -}}
{{- $part = dict "all" true "first" 0 "count" . "maxFailures" nil "order" 0 "account" (include "hcm-db-migrations.testName" $) "args" (list "current") "expected" "(head)" -}}
{{- end -}}
{{- toJson $part -}}
{{- end -}}

{{/* Annotations that order the hooks of targets: (dict "root" $ "order" <-2: ServiceAccount, -1: canaries, 0: the rest>), from the Job's.
A sync wave takes precedence over the weight in Argo CD, also of objects that are no hooks. */}}
{{- define "hcm-db-migrations.orderAnnotations" -}}
{{- $order := .order | int64 -}}
{{- with .root.Values -}}
{{- $annotations := merge (dict) (.job.annotations | default dict) (.commonAnnotations | default dict) -}}
{{- $defaults := ternary (dict "helm.sh/hook-weight" "0") dict (ne .hook "") -}}
{{- range $name, $value := merge (pick $annotations "helm.sh/hook-weight" "argocd.argoproj.io/sync-wave") $defaults }}
{{ $name }}: {{ add $value $order | quote }}
{{- end -}}
{{- end -}}
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
{{- /* Then the report, which may wait for its own turn. */ -}}
{{- add (mul $rounds $target) (max $attempt $pause) -}}
{{- end -}}

{{/* Seconds of Helm's --timeout that fit the longest Job of the targets, and 50 s for the end of its pods: helm test's has them all. */}}
{{- define "hcm-db-migrations.timeout" -}}
{{- include "hcm-db-migrations.partDeadline" (dict "root" . "count" (len (.Values.targets | default list))) | int64 | add 50 -}}
{{- end -}}

{{/* Name of the pods' ServiceAccount, whose token the container "rollout" has: (dict "root" $ "part" <of targets>). */}}
{{- define "hcm-db-migrations.serviceAccountName" -}}
{{- with .root -}}
{{- $own := ($.part | default dict).account | default (include "hcm-db-migrations.fullname" . | printf "%s-rollout") -}}
{{- .Values.serviceAccountName | default (ternary $own "" (not (empty .Values.targets))) -}}
{{- end -}}
{{- end -}}

{{/* Whether retries are counted for each target, which Kubernetes 1.28 does not do. */}}
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
