{{/* The git-sync init container. Flags, not variables: git-sync refuses an unknown flag, but ignores an unknown variable. */}}
{{- define "hcm-db-migrations.gitSync" -}}
{{- $ssh := include "hcm-db-migrations.isSSH" .Values -}}
{{- $passwd := include "hcm-db-migrations.needsPasswd" . -}}
{{- $deadline := int64 .Values.job.activeDeadlineSeconds -}}
{{- $attempt := div $deadline 5 | max 10 -}}
{{- with .Values.git -}}
{{- if $passwd -}}
# ssh requires an entry for its user in /etc/passwd.
- name: passwd
  image: {{ include "hcm-db-migrations.image" .image | quote }}
  imagePullPolicy: {{ .image.pullPolicy }}
  command:
    - sh
    - -c
    - '{ echo "git-sync:x:$(id -u):$(id -g)::/git-home:/sbin/nologin"; cat /etc/passwd; } >/git-home/passwd'
  {{- include "hcm-db-migrations.containerSettings" (dict "root" $ "resources" .resources) | nindent 2 }}
  volumeMounts:
    - {name: git-home, mountPath: /git-home}
{{ end -}}
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
    {{- with .filter }}
    - {{ printf "--filter=%s" . | quote }}
    {{- end }}
    - --sparse-checkout-file=/etc/git-sync/sparse-checkout
    - --submodules=off
    - --git-gc=off
    # Two attempts, each a fifth of the deadline. git-sync exceeds that while a server is silent: CLONE_SECONDS ends both.
    - --max-failures=2
    - --period=2s
    - --sync-timeout={{ $attempt }}s
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
    - {name: HOME, value: /git-home}
    - {name: TMPDIR, value: /git-home}
    # Both attempts, with the pause and some seconds more. Of a short deadline, it leaves two fifths to report the reason.
    - {name: CLONE_SECONDS, value: {{ min (add (mul 2 $attempt) 7) (div (mul 3 $deadline) 5) | quote }}}
    - {name: USERNAME_FILE, value: {{ ternary "/etc/git-sync/username" "" (and (not $ssh) (not (empty .httpsSecretName))) | quote }}}
    {{- if or .ca.configMapName .ca.secretName }}
    - {name: GIT_SSL_CAINFO, value: /etc/git-sync/ca.crt}
    {{- end }}
    {{- range $.Values.extraEnv }}
    {{- if include "hcm-db-migrations.isProxyVariable" .name }}
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
  {{- include "hcm-db-migrations.containerSettings" (dict "root" $ "resources" .resources) | nindent 2 }}
  volumeMounts:
    - {name: workspace, mountPath: /workspace}
    # git's configuration and socket for the credentials, which the migrate container does not see.
    - {name: git-home, mountPath: /git-home}
    - {name: git, mountPath: /etc/git-sync, readOnly: true}
    {{- if $passwd }}
    - {name: git-home, mountPath: /etc/passwd, subPath: passwd, readOnly: true}
    {{- end }}
{{- end -}}
{{- end -}}

{{/* Not empty if the clone uses ssh, as another user than the one in /etc/passwd of git-sync's image. Without an ID, the
platform assigns one. */}}
{{- define "hcm-db-migrations.needsPasswd" -}}
{{- $pod := .Values.podSecurityContext | default dict -}}
{{- $container := .Values.securityContext | default dict -}}
{{- $user := ternary $container.runAsUser $pod.runAsUser (not (kindIs "invalid" $container.runAsUser)) -}}
{{- if and (include "hcm-db-migrations.isSSH" .Values) (ne (toString $user) "65533") }}true{{ end -}}
{{- end -}}

{{/* The files of that container: optional, because a missing Secret would keep the pod waiting; sync.sh checks them. The
sparse checkout patterns come from an annotation, which needs no separate object. */}}
{{- define "hcm-db-migrations.gitVolume" -}}
- name: git-home
  emptyDir: {{ include "hcm-db-migrations.emptyDir" . }}
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

{{/* Not empty if git reads the variable of this name, too. */}}
{{- define "hcm-db-migrations.isProxyVariable" -}}
{{- if regexMatch "(?i)^(http|https|no|all)_proxy$" . }}true{{ end -}}
{{- end -}}
