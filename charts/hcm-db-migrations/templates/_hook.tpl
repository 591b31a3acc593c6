{{/* Annotations of a hook: (dict "root" $ "hook" <its events>). A failed Job and its log are kept until the TTL expires: the
next Job has another name. */}}
{{- define "hcm-db-migrations.hook" -}}
helm.sh/hook: {{ .hook | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- /* Flux's helm-controller (1.6.3 and older) crashes on it. Helm's version has three numbers in Helm's own program, which
prints the log, and two (v4.3) in a program that embeds Helm. */}}
{{- if regexMatch "^v[0-9]+[.][0-9]+[.][0-9]+" .root.Capabilities.HelmVersion.Version }}
helm.sh/hook-output-log-policy: hook-succeeded,hook-failed
{{- end }}
{{- end -}}
