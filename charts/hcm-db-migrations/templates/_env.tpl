{{/* Environment of the migrate container: (dict "root" $ "expected" <text>). An entry of extraEnv replaces the chart's
own of the same name, because some ways to apply a manifest refuse duplicate names. The chart's own come first, so that
$(DB_PASSWORD) in a later one, such as DATABASE_URL, is expanded. */}}
{{- define "hcm-db-migrations.env" -}}
{{- $theirs := list -}}
{{- range .root.Values.extraEnv }}{{ $theirs = append $theirs .name }}{{ end -}}
{{- $entries := list -}}
{{- range include "hcm-db-migrations.ownEnv" (merge (dict "theirs" $theirs) .) | fromYamlArray -}}
{{- if not (has .name $theirs) -}}
{{- $entries = append $entries . -}}
{{- end -}}
{{- end -}}
{{- concat $entries (.root.Values.extraEnv | default list) | toYaml -}}
{{- end -}}

{{/* References are optional: a missing one would keep the pod waiting until its deadline. migrate.sh checks them. */}}
{{- define "hcm-db-migrations.ownEnv" -}}
{{- $theirs := .theirs -}}
{{- with .root.Values -}}
- {name: HOME, value: /workspace}
- {name: TMPDIR, value: /workspace}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: NAMESPACE, value: {{ include "hcm-db-migrations.namespace" $.root | quote }}}
- {name: GIT_REPO, value: {{ .git.repo | quote }}}
- {name: GIT_REF, value: {{ .git.branch | quote }}}
- {name: GIT_PATH, value: {{ clean .git.path | quote }}}
- {name: REQUIREMENTS, value: {{ .requirements | quote }}}
{{- with $.expected }}
- {name: EXPECTED, value: {{ . | quote }}}
{{- end }}
- name: DB_HOST
  valueFrom: {configMapKeyRef: {name: {{ .db.configMap.name | quote }}, key: {{ .db.configMap.hostKey | quote }}, optional: true}}
- {name: DB_PORT, value: {{ .db.port | int64 | quote }}}
- name: DB_NAME
  valueFrom: {configMapKeyRef: {name: {{ .db.configMap.name | quote }}, key: {{ .db.configMap.nameKey | quote }}, optional: true}}
- name: DB_USER
  valueFrom: {secretKeyRef: {name: {{ .db.secret.name | quote }}, key: {{ .db.secret.usernameKey | quote }}, optional: true}}
- name: DB_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .db.secret.name | quote }}, key: {{ .db.secret.passwordKey | quote }}, optional: true}}
- name: REQUIRED
  value: |
    {{- if has "DATABASE_URL" $theirs }}
    DATABASE_URL extraEnv
    {{- else }}
    DB_HOST {{ ternary "extraEnv" (printf "key %q of ConfigMap %q" .db.configMap.hostKey .db.configMap.name) (has "DB_HOST" $theirs) }}
    DB_NAME {{ ternary "extraEnv" (printf "key %q of ConfigMap %q" .db.configMap.nameKey .db.configMap.name) (has "DB_NAME" $theirs) }}
    DB_USER {{ ternary "extraEnv" (printf "key %q of Secret %q" .db.secret.usernameKey .db.secret.name) (has "DB_USER" $theirs) }}
    {{- if not (has "DB_PASSWORD" $theirs) }}
    DB_PASSWORD {{ printf "key %q of Secret %q" .db.secret.passwordKey .db.secret.name }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end -}}
