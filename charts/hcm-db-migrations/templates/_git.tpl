{{/* The git-sync init container. Flags, not variables: git-sync refuses an unknown flag, but ignores an unknown variable. */}}
{{- define "hcm-db-migrations.gitSync" -}}
{{- $ssh := include "hcm-db-migrations.isSSH" .Values -}}
{{- with .Values.git -}}
- name: git-sync
  image: {{ include "hcm-db-migrations.image" .image | quote }}
  imagePullPolicy: {{ .image.pullPolicy }}
  command:
    - sh
    - -c
    - |
      {{- $.Files.Get "files/sync.sh" | trim | nindent 6 }}
    - sync
    - /git-sync
  args:
    - {{ printf "--repo=%s" .repo | quote }}
    - {{ printf "--ref=%s" .branch | quote }}
    - --root=/workspace/git
    - --link=code
    - --one-time
    - --depth=1
    - --filter=blob:none
    - --sparse-checkout-file=/etc/git-sync/sparse-checkout
    - --submodules=off
    - --git-gc=off
    # Two attempts, each a fifth of the deadline: a dead server leaves time for the Job's second pod.
    - --max-failures=2
    - --period=2s
    - --sync-timeout={{ div $.Values.job.activeDeadlineSeconds 5 | max 10 }}s
    # Outside the root, which git-sync empties.
    - --error-file=/workspace/git-error
    {{- if $ssh }}
    - --ssh-key-file=/etc/git-sync/ssh
    - --ssh-known-hosts={{ .knownHosts }}
    {{- if .knownHosts }}
    - --ssh-known-hosts-file=/etc/git-sync/known_hosts
    {{- end }}
    {{- else if .httpsSecretName }}
    - --password-file=/etc/git-sync/password
    {{- end }}
  workingDir: /workspace
  env:
    - {name: HOME, value: /workspace}
    - {name: TMPDIR, value: /workspace}
    - {name: USERNAME_FILE, value: {{ ternary "/etc/git-sync/username" "" (and (not $ssh) (not (empty .httpsSecretName))) | quote }}}
    {{- if or .ca.configMapName .ca.secretName }}
    - {name: GIT_SSL_CAINFO, value: /etc/git-sync/ca.crt}
    {{- end }}
    {{- range $.Values.extraEnv }}
    {{- if regexMatch "(?i)^(http|https|no|all)_proxy$" .name }}
    - {{ toYaml . | nindent 6 | trim }}
    {{- end }}
    {{- end }}
    - {name: NAMESPACE, value: {{ include "hcm-db-migrations.namespace" $ | quote }}}
    - name: REQUIRED
      value: |
        {{- range $source := include "hcm-db-migrations.gitSources" $ | fromYamlArray }}
        {{- range $source.items }}
        {{ printf "/etc/git-sync/%s key %q of %s %q" .path .key $source.kind $source.name }}
        {{- end }}
        {{- end }}
  terminationMessagePolicy: FallbackToLogsOnError
  {{- with $.Values.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - {name: workspace, mountPath: /workspace}
    - {name: git, mountPath: /etc/git-sync, readOnly: true}
{{- end -}}
{{- end -}}

{{/* The files of that container: optional, because a missing Secret would keep the pod waiting; sync.sh checks them. The
sparse checkout patterns come from an annotation, which needs no separate object. */}}
{{- define "hcm-db-migrations.gitVolume" -}}
- name: git
  projected:
    sources:
      - downwardAPI:
          items:
            - path: sparse-checkout
              fieldRef: {fieldPath: "metadata.annotations['hcm-db-migrations/sparse-checkout']"}
      {{- range include "hcm-db-migrations.gitSources" . | fromYamlArray }}
      - {{ .kind | untitle }}:
          name: {{ .name | quote }}
          optional: true
          items:
            {{- toYaml .items | nindent 12 }}
      {{- end }}
{{- end -}}

{{/* Secrets and ConfigMaps that git.repo needs, with their keys and file names. */}}
{{- define "hcm-db-migrations.gitSources" -}}
{{- $ssh := include "hcm-db-migrations.isSSH" .Values -}}
{{- with .Values.git -}}
{{- if $ssh }}
- kind: Secret
  name: {{ .secretName | quote }}
  items:
    # ssh refuses a key that others can read.
    - {key: ssh, path: ssh, mode: 0400}
    {{- if .knownHosts }}
    - {key: known_hosts, path: known_hosts}
    {{- end }}
{{- else if .httpsSecretName }}
- kind: Secret
  name: {{ .httpsSecretName | quote }}
  items: [{key: username, path: username}, {key: password, path: password}]
{{- end }}
{{- if or .ca.configMapName .ca.secretName }}
- kind: {{ ternary "Secret" "ConfigMap" (empty .ca.configMapName) }}
  name: {{ .ca.configMapName | default .ca.secretName | quote }}
  items: [{key: {{ .ca.key | quote }}, path: ca.crt}]
{{- end }}
{{- end -}}
{{- end -}}

{{/* Sparse checkout patterns for git.path. git-sync enables cone mode, which needs this full form: /a/b/ alone checks out nothing. */}}
{{- define "hcm-db-migrations.sparseCheckout" -}}
{{- $patterns := list "/*" -}}
{{- $folder := "/" -}}
{{- range without (splitList "/" (clean .Values.git.path)) "." -}}
{{- $patterns = append $patterns (printf "!%s*/" $folder) -}}
{{- $folder = printf "%s%s/" $folder . -}}
{{- $patterns = append $patterns $folder -}}
{{- end -}}
{{- join "\n" $patterns }}
{{ end -}}

{{/* Not empty if git.repo is an SSH URL. */}}
{{- define "hcm-db-migrations.isSSH" -}}
{{- if regexMatch "^(ssh://|[A-Za-z0-9._-]+@[^/:]+:)" .git.repo }}true{{ end -}}
{{- end -}}
