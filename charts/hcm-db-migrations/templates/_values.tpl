{{/* Every template starts with this: it finalizes .Values and fails if they are invalid.

Values nested under "hcm-db-migrations:", as in an overlay for an umbrella chart, are merged over the chart's own values.
A second call finds nothing nested and changes nothing. */}}
{{- define "hcm-db-migrations.init" -}}
{{- $problems := dict "list" list -}}
{{- with index .Values "hcm-db-migrations" -}}
{{- $defaults := $.Files.Get "files/defaults.json" | fromJson -}}
{{- include "hcm-db-migrations.merge" (dict "path" "" "from" . "into" $.Values "defaults" $defaults "problems" $problems) -}}
{{- end -}}
{{- $_ := unset .Values "hcm-db-migrations" -}}
{{- include "hcm-db-migrations.checkNulls" (dict "root" . "problems" $problems) -}}
{{- if not $problems.list -}}
{{- range list "repo" "branch" }}{{ if not (index $.Values.git .) }}{{ $_ := set $.Values.git . "" }}{{ end }}{{ end -}}
{{- /* Kubernetes would read a null quantity as 0. */ -}}
{{- range list .Values.resources .Values.git.resources -}}
{{- range $quantities := . -}}
{{- range $name, $quantity := $quantities -}}
{{- if kindIs "invalid" $quantity }}{{ $_ := unset $quantities $name }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "hcm-db-migrations.check" (dict "root" . "problems" $problems) -}}
{{- end -}}
{{- with $problems.list -}}
{{- fail (printf "\n\nInvalid values for hcm-db-migrations:\n\n- %s\n\nSee \"Values\" in README.md of the chart (helm show readme).\n" (join "\n- " .)) -}}
{{- end -}}
{{- end -}}

{{/* Merges the map "from" into the map "into", in place; null deletes. A value of "into" that differs from "defaults" was
set by the user at the top level: a different nested value is a problem. Values are not shown: they may be secret. */}}
{{- define "hcm-db-migrations.merge" -}}
{{- range $key, $value := .from -}}
{{- $path := printf "%s%s" $.path $key -}}
{{- $old := index $.into $key -}}
{{- $default := index $.defaults $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $old) -}}
{{- $default = ternary $default dict (kindIs "map" $default) -}}
{{- include "hcm-db-migrations.merge" (dict "path" (printf "%s." $path) "from" $value "into" $old "defaults" $default "problems" $.problems) -}}
{{- else -}}
{{- if and (hasKey $.into $key) (ne (toJson $old) (toJson $default)) (ne (toJson $old) (toJson $value)) -}}
{{- $problem := printf "%q and %q are set to different values: set only one of them (on the command line: --set hcm-db-migrations.%s=...)" $path (printf "hcm-db-migrations.%s" $path) $path -}}
{{- $_ := set $.problems "list" (append $.problems.list $problem) -}}
{{- end -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $.into $key -}}
{{- else -}}
{{- $_ := set $.into $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
