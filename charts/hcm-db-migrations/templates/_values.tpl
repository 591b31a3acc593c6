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
{{- /* Kubernetes would read a null quantity as 0. */ -}}
{{- range list .Values.resources .Values.git.resources -}}
{{- range $quantities := . -}}
{{- range $name, $quantity := $quantities -}}
{{- if kindIs "invalid" $quantity }}{{ $_ := unset $quantities $name }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "hcm-db-migrations.check" (dict "root" . "problems" $problems) -}}
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

{{/* Adds to "problems" what the schema cannot check, or not with a helpful message. */}}
{{- define "hcm-db-migrations.check" -}}
{{- $problems := .problems.list -}}
{{- with .root.Values -}}
{{- $unset := list -}}
{{- if not .git.repo }}{{ $unset = append $unset "\"git.repo\"" }}{{ end -}}
{{- if not .git.branch }}{{ $unset = append $unset "\"git.branch\"" }}{{ end -}}
{{- with $unset -}}
{{- $problems = append $problems (printf "%s not set: add to a values file (-f)\n\n    hcm-db-migrations:\n      git:\n        repo: \"https://github.com/<owner>/<repository>\"   # or git@github.com:<owner>/<repository>\n        branch: \"<branch, tag or full commit SHA>\"\n" (ternary (printf "%s is" (join "" .)) (printf "%s are" (join " and " .)) (eq (len .) 1))) -}}
{{- end -}}
{{- $ssh := include "hcm-db-migrations.isSSH" . -}}
{{- $host := "([A-Za-z0-9][A-Za-z0-9._-]*|\\[[0-9A-Fa-f:.]+\\])" -}}
{{- if regexMatch "^(https?://([^/]*@|.*[?])|ssh://[^/]*:[^/]*@)" .git.repo -}}
{{- $problems = append $problems "\"git.repo\" contains credentials or a query string, which logs would show: put them into a Secret and set its name as \"git.httpsSecretName\" (user and token for https://) or \"git.secretName\" (SSH key)" -}}
{{- else if and .git.repo (not (regexMatch (printf "^(https?://%s(:[0-9]+)?/|ssh://([A-Za-z0-9._-]+@)?%s(:[0-9]+)?/|[A-Za-z0-9._-]+@%s:)[^\\s?#]+$" $host $host $host) .git.repo)) -}}
{{- $problems = append $problems "\"git.repo\" is not a valid repository URL: set https://host/path, git@host:path or ssh://git@host/path" -}}
{{- end -}}
{{- if and $ssh (or .git.httpsSecretName .git.ca.configMapName .git.ca.secretName) -}}
{{- $problems = append $problems "\"git.httpsSecretName\" and \"git.ca\" are for https:// URLs only, but \"git.repo\" is an SSH URL: unset them, or set an https:// URL" -}}
{{- end -}}
{{- if and .git.ca.configMapName .git.ca.secretName -}}
{{- $problems = append $problems "\"git.ca.configMapName\" and \"git.ca.secretName\" are both set: keep the one that holds the CA" -}}
{{- end -}}
{{- if and (regexMatch "^[0-9a-f]{7,39}$" .git.branch) (regexMatch "[0-9]" .git.branch) (regexMatch "[a-f]" .git.branch) -}}
{{- $problems = append $problems (printf "\"git.branch\" is %q, which looks like an abbreviated commit SHA; git servers only accept full ones: set the full 40-character SHA (git rev-parse %s), or refs/heads/%s if it is a branch" .git.branch .git.branch .git.branch) -}}
{{- end -}}
{{- if or (regexMatch "[][*?!\\\\\"\\s]" .git.path) (hasPrefix "/" .git.path) (has ".." (splitList "/" .git.path)) -}}
{{- $problems = append $problems (printf "\"git.path\" is %q: set a folder relative to the repository's root, such as utilities/hcm-db-migrations, or . for the root (no .., space or * ? [ ] ! \\ \")" .git.path) -}}
{{- end -}}
{{- range $path, $image := dict "image" .image "git.image" .git.image -}}
{{- if not (or $image.tag $image.digest) -}}
{{- $problems = append $problems (printf "%q has neither tag nor digest, and would be unpinned: set \"%s.tag\" or \"%s.digest\"" $path $path $path) -}}
{{- end -}}
{{- end -}}
{{- $taken := list "EXPECTED" "GIT_PATH" "GIT_REF" "GIT_REPO" "NAMESPACE" "REQUIRED" "REQUIREMENTS" "USERNAME_FILE" -}}
{{- $seen := list -}}
{{- $wrong := list -}}
{{- range .extraEnv -}}
{{- if or (has .name $taken) (has .name $seen) }}{{ $wrong = append $wrong .name }}{{ end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- with $wrong -}}
{{- $problems = append $problems (printf "\"extraEnv\" has duplicate or reserved variable names (%s): define each variable once, and none of %s" (uniq . | join ", ") (join ", " $taken)) -}}
{{- end -}}
{{- range .args -}}
{{- if regexMatch "^[+-][0-9]+$" . -}}
{{- $problems = append $problems (printf "\"args\" contains %q, which is relative to the current revision, and Kubernetes may run a Job's pod twice: name the revision, such as [downgrade, \"002\"]" .) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .hook "") (has (first .args) (list "downgrade" "stamp")) -}}
{{- $problems = append $problems (printf "\"args\" is a %s and \"hook\" is \"\": helm rollback, or a tool that applies an older state, would run this Job again: set \"hook\" to pre-install,pre-upgrade for this one upgrade" (first .args)) -}}
{{- end -}}
{{- range ternary (splitList "," .hook | uniq) list (ne .hook "") -}}
{{- if not (has . (list "pre-install" "pre-upgrade" "post-install" "post-upgrade")) -}}
{{- $problems = append $problems (printf "\"hook\" contains %q: set pre-install,pre-upgrade or post-install,post-upgrade, or \"\" for an ordinary Job" .) -}}
{{- end -}}
{{- end -}}
{{- if eq .enabled false -}}
{{- $problems = append $problems "\"enabled\" is false, which only works in an umbrella chart: add condition: hcm-db-migrations.enabled to the umbrella's Chart.yaml, or do not install this chart" -}}
{{- end -}}
{{- end -}}
{{- $_ := set .problems "list" $problems -}}
{{- end -}}

{{/* Not empty if git.repo is an SSH URL. */}}
{{- define "hcm-db-migrations.isSSH" -}}
{{- if regexMatch "^(ssh://|[A-Za-z0-9._-]+@[^/:]+:)" .git.repo }}true{{ end -}}
{{- end -}}
