{{/* Adds to "problems" the values that are null, which removed the default, though the templates need them. */}}
{{- define "hcm-db-migrations.checkNulls" -}}
{{- $names := list "namespace" "fullnameOverride" "requirements" "args" "hook" "image.repository" "image.pullPolicy" -}}
{{- $names = concat $names (list "git.path" "git.filter" "git.secretName" "git.knownHosts" "git.httpsSecretName") -}}
{{- $names = concat $names (list "git.ca.configMapName" "git.ca.secretName" "git.ca.key" "git.image.repository" "git.image.pullPolicy") -}}
{{- $names = concat $names (list "db.port" "db.configMap.name" "db.configMap.hostKey" "db.configMap.nameKey") -}}
{{- $names = concat $names (list "db.secret.name" "db.secret.usernameKey" "db.secret.passwordKey" "job.activeDeadlineSeconds" "job.backoffLimit") -}}
{{- if .root.Values.targets }}{{ $names = concat $names (list "rollout.canary" "rollout.parallelism") }}{{ end -}}
{{- $nulls := list -}}
{{- range $names -}}
{{- $value := $.root.Values -}}
{{- $path := list -}}
{{- range splitList "." . -}}
{{- if kindIs "map" $value -}}
{{- $path = append $path . -}}
{{- $value = index $value . -}}
{{- end -}}
{{- end -}}
{{- if kindIs "invalid" $value }}{{ $nulls = append $nulls (join "." $path) }}{{ end -}}
{{- end -}}
{{- range uniq $nulls -}}
{{- $_ := set $.problems "list" (append $.problems.list (printf "%q is null, which removes the default: set a value, or leave it out (after --reuse-values of an older chart: use --reset-then-reuse-values)" .)) -}}
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
{{- if and .git.httpsSecretName (hasPrefix "http://" .git.repo) -}}
{{- $problems = append $problems "\"git.httpsSecretName\" is set, but \"git.repo\" is an http:// URL, which would send the token unencrypted: set an https:// URL" -}}
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
{{- $texts := dict "args" (join "" .args) "git.repo" .git.repo "git.branch" .git.branch "git.path" .git.path "requirements" .requirements -}}
{{- range $path, $text := $texts -}}
{{- with regexFind "[\\p{C}\\p{Z}]" (regexReplaceAll "\\s" $text "") -}}
{{- $problems = append $problems (printf "%q contains the unprintable character %q: remove it" $path .) -}}
{{- end -}}
{{- end -}}
{{- range $path, $text := $texts -}}
{{- if regexMatch "[$][$(]" $text -}}
{{- $problems = append $problems (printf "%q contains $( or $$, which Kubernetes would replace: remove it" $path) -}}
{{- end -}}
{{- end -}}
{{- range $path, $image := dict "image" .image "git.image" .git.image -}}
{{- if not (or $image.tag $image.digest) -}}
{{- $problems = append $problems (printf "%q has neither tag nor digest, and would be unpinned: set \"%s.tag\" or \"%s.digest\"" $path $path $path) -}}
{{- end -}}
{{- end -}}
{{- $taken := list "EXPECTED" "GIT_COMMIT" "GIT_PATH" "GIT_REF" "GIT_REPO" "JOB_COMPLETION_INDEX" "NAMESPACE" "POSITION_FILE" "REQUIRED" "REQUIREMENTS" "USERNAME_FILE" -}}
{{- $seen := list -}}
{{- $wrong := list -}}
{{- range .extraEnv -}}
{{- if or (has .name $taken) (has .name $seen) }}{{ $wrong = append $wrong .name }}{{ end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- with $wrong -}}
{{- $problems = append $problems (printf "\"extraEnv\" has duplicate or reserved variable names (%s): define each variable once, and none of %s" (uniq . | join ", ") (join ", " $taken)) -}}
{{- end -}}
{{- $secrets := list -}}
{{- range .extraEnv -}}
{{- if include "hcm-db-migrations.isSecret" (dict "name" .name "value" .value) }}{{ $secrets = append $secrets .name }}{{ end -}}
{{- if and (include "hcm-db-migrations.isProxyVariable" .name) (contains "$(" (.value | default "")) -}}
{{- $problems = append $problems (printf "\"extraEnv\" sets %s with $(...), which git-sync would get unexpanded: put the whole URL into a Secret and reference it by valueFrom" .name) -}}
{{- end -}}
{{- end -}}
{{- with $secrets -}}
{{- $problems = append $problems (printf "\"extraEnv\" sets secrets (%s) as literals, which everyone who can read the release or the Job would see: put each into a Secret and reference it\n\n    extraEnv:\n      - {name: %s, valueFrom: {secretKeyRef: {name: <Secret>, key: <key>}}}\n" (join ", " .) (first .)) -}}
{{- end -}}
{{- range .args -}}
{{- if include "hcm-db-migrations.isSecret" (dict "name" "" "value" .) -}}
{{- $problems = append $problems "\"args\" contains a password or token, which logs would show: put it into a Secret, and reference that as DATABASE_URL in \"extraEnv\"" -}}
{{- end -}}
{{- if regexMatch "(^|[@:])[+-][0-9]+$" . -}}
{{- $problems = append $problems (printf "\"args\" contains %q, which is relative to the current revision, and Kubernetes may run a Job's pod twice: name the revision, such as [downgrade, \"002\"]" .) -}}
{{- end -}}
{{- end -}}
{{- if eq .hook "" -}}
{{- range .args -}}
{{- if has . (list "downgrade" "stamp") -}}
{{- $problems = append $problems (printf "\"args\" is a %s and \"hook\" is \"\": helm rollback, or a tool that applies an older state, would run this Job again: set \"hook\" to pre-install,pre-upgrade for this one upgrade" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $path, $annotations := dict "commonAnnotations" .commonAnnotations "job.annotations" .job.annotations -}}
{{- range $name, $_ := $annotations -}}
{{- if has $name (list "helm.sh/hook" "helm.sh/hook-delete-policy" "helm.sh/hook-output-log-policy") -}}
{{- $problems = append $problems (printf "%q contains %q, which the chart sets: remove it, and set \"hook\"" $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $owned := list "activeDeadlineSeconds" "affinity" "automountServiceAccountToken" "containers" "enableServiceLinks" "ephemeralContainers" "hostIPC" "hostNetwork" "hostPID" "imagePullSecrets" "initContainers" "nodeSelector" "restartPolicy" "securityContext" "serviceAccount" "serviceAccountName" "shareProcessNamespace" "terminationGracePeriodSeconds" "tolerations" "volumes" -}}
{{- range $name, $_ := .extraPodSpec -}}
{{- if has $name $owned -}}
{{- $problems = append $problems (printf "\"extraPodSpec\" contains %q, which the chart sets, or leaves unset for the pod's isolation: remove it, or set the chart's value of that name" $name) -}}
{{- end -}}
{{- end -}}
{{- range ternary (splitList "," .hook | uniq) list (ne .hook "") -}}
{{- if not (has . (list "pre-install" "pre-upgrade" "post-install" "post-upgrade")) -}}
{{- $problems = append $problems (printf "\"hook\" contains %q: set pre-install,pre-upgrade or post-install,post-upgrade, or \"\" for an ordinary Job" .) -}}
{{- end -}}
{{- end -}}
{{- $problems = concat $problems (include "hcm-db-migrations.targetProblems" $.root | fromJsonArray) -}}
{{- if eq .enabled false -}}
{{- $problems = append $problems "\"enabled\" is false, which only works in an umbrella chart: add condition: hcm-db-migrations.enabled to the umbrella's Chart.yaml, or do not install this chart" -}}
{{- end -}}
{{- end -}}
{{- $_ := set .problems "list" $problems -}}
{{- end -}}

{{/* What is wrong with "targets" and "rollout", as JSON. */}}
{{- define "hcm-db-migrations.targetProblems" -}}
{{- $problems := list -}}
{{- $names := dict -}}
{{- $databases := dict -}}
{{- $fields := dict -}}
{{- range $target := .Values.targets -}}
{{- if hasKey $names .name -}}
{{- $problems = append $problems (printf "\"targets\" has two entries with the name %q: rename one" .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- with regexFind "[\\p{C}\\p{Z}]" (.schema | default "" | replace " " "") -}}
{{- $problems = append $problems (printf "\"targets\" contains the unprintable character %q, in the schema of %q: remove it" . $target.name) -}}
{{- end -}}
{{- $configMap := merge dict (.configMap | default dict) $.Values.db.configMap -}}
{{- $database := list $configMap.name $configMap.hostKey $configMap.nameKey (.port | default $.Values.db.port | int64) (.schema | default "") -}}
{{- /* Without a schema, it is the role's. */ -}}
{{- if not .schema }}{{ $secret := merge dict (.secret | default dict) $.Values.db.secret }}{{ $database = concat $database (list $secret.name $secret.usernameKey) }}{{ end -}}
{{- $database = toJson $database -}}
{{- with get $databases $database -}}
{{- $problems = append $problems (printf "\"targets\" has two entries with the same database and schema, %q and %q: remove one, or set its \"schema\", \"configMap\" or \"port\"" . $target.name) -}}
{{- end -}}
{{- $_ := set $databases $database .name -}}
{{- range $field, $_ := . }}{{ $_ := set $fields $field true }}{{ end -}}
{{- if dig "secret" "passwordKey" "" . }}{{ $_ := set $fields "passwordKey" true }}{{ end -}}
{{- end -}}
{{- range (.Values.rollout | default dict).only -}}
{{- if not (hasKey $names .) -}}
{{- $problems = append $problems (printf "\"rollout.only\" contains %q, which is no name in \"targets\": set one of their names, or [] for all" .) -}}
{{- end -}}
{{- end -}}
{{- if .Values.targets -}}
{{- $own := dict "DATABASE_URL" (list "configMap" "port" "secret") "DB_HOST" (list "configMap") "DB_NAME" (list "configMap") -}}
{{- $own = merge $own (dict "DB_PORT" (list "port") "DB_SCHEMA" (list "schema") "DB_USER" (list "secret") "DB_PASSWORD" (list "passwordKey")) -}}
{{- range $variable := .Values.extraEnv -}}
{{- range get $own .name | default list -}}
{{- if hasKey $fields . -}}
{{- $problems = append $problems (printf "\"extraEnv\" sets %s for all of \"targets\", and some have their own %q: remove one of the two" $variable.name .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraVolumeMounts -}}
{{- if regexMatch "^/?etc/target(/|$)" (clean .mountPath) -}}
{{- $problems = append $problems (printf "\"extraVolumeMounts\" contains %q, where the pods of \"targets\" have their own: set another path" .mountPath) -}}
{{- end -}}
{{- end -}}
{{- with include "hcm-db-migrations.fullname" . -}}
{{- /* With a digest, "-canary" and an index, it is a label of 63 characters. */ -}}
{{- if gt (len .) 41 -}}
{{- $problems = append $problems (printf "the name %q has more than 41 characters, which is too long for the pods of \"targets\": set \"fullnameOverride\"" .) -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.hook) .Values.rollout.canary -}}
{{- $problems = append $problems "\"rollout.canary\" needs hooks, which run one Job after the other, and \"hook\" is \"\": set \"rollout.canary\" to 0" -}}
{{- end -}}
{{- $size := include "hcm-db-migrations.targetList" . | len -}}
{{- if gt $size 250000 -}}
{{- $problems = append $problems (printf "\"targets\" takes %d bytes in the pod's annotation, which holds 250000: divide them among several releases" $size) -}}
{{- end -}}
{{- $seconds := include "hcm-db-migrations.timeout" . | int64 -}}
{{- if gt $seconds 604800 -}}
{{- $problems = append $problems (printf "\"targets\" may take %d s with these deadlines, retries and parallelism, which is more than 7 days, and no --timeout of Helm should be that long: raise \"rollout.parallelism\", lower \"job.activeDeadlineSeconds\" or \"job.backoffLimit\", or divide them among several releases" $seconds) -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{/* Not empty if a literal is a secret, by its name or as a URL: (dict "name" "value"). A reference, $(NAME), is not. A number
after a host is its port. */}}
{{- define "hcm-db-migrations.isSecret" -}}
{{- $value := regexReplaceAll "[$][(][A-Za-z0-9_]+[)]" (.value | default "") "" -}}
{{- $words := "(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|CREDENTIAL|BEARER|JWT|(DB|PG|USER)(PASS|PWD)$|_(PASS|PWD|PSW|PW|PAT)$|AUTHORIZATION$|(API|ACCESS|PRIVATE|SIGNING|ENCRYPTION|APP|MASTER|LICENSE|FERNET)_?KEY)" -}}
{{- $settings := "FILE|PATH|DIR|NAME|NAMESPACE|LENGTH|TTL|ID|URL|URI|ENDPOINT|ISSUER|AUDIENCE|TYPE|ALGORITHM|REGION|ARN|REF|PROVIDER|BACKEND|STORE|HASHER|HEADER|PREFIX|ALIAS|LEEWAY|POLICY|SECONDS|MINUTES" -}}
{{- $harmless := printf "_(%s)$|^(MAX|MIN)_|KEYSPACE|PASSWORD_ENCRYPTION" $settings -}}
{{- $named := and (regexMatch (printf "(?i)%s" $words) .name) (not (regexMatch (printf "(?i)%s" $harmless) .name)) -}}
{{- $switch := and (regexMatch "^(?i)(|true|false|yes|no|on|off|[01])$" $value) (not (has .name (list "DB_PASSWORD" "PGPASSWORD"))) -}}
{{- $path := and (regexMatch "^/[^=+]+$" $value) (regexMatch "(?i)(KEY|CREDENTIALS?)$" .name) -}}
{{- $web := regexReplaceAll "(https?://[^/?#@:]+):[0-9]+([/?#]|$)" (regexReplaceAll "@sha256:[0-9a-f]+" $value "") "${1}${2}" -}}
{{- $urls := "https?://[^/?#@]*:[^@]+@|https?://[^/?#@:]+@|[a-z0-9+]+://[^/?#@]*:[^?@]+@|(^|[?&;\\s])([a-z0-9_]*passw(or)?d|dbpass|pwd)\\s*=\\s*[^&;\\s]|(^|[?&;\\s])([a-z]+_)?(token|api_?key|sig)=[^&;\\s]|(gh[pousr]_|github_pat_|glpat-)[a-z0-9_]{16}|eyJ[a-z0-9_-]{6,}[.]eyJ|-----BEGIN [A-Z ]*PRIVATE KEY" -}}
{{- $isProxy := hasSuffix "PROXY" (upper .name) -}}
{{- $proxy := and $isProxy (regexMatch "^[^/?#@]+@|://[^/?#@]+@" ($value | replace "://:@" "://")) -}}
{{- if or (and $value $named (not $switch) (not $path)) (regexMatch (printf "(?i)(%s)" $urls) $web) $proxy -}}
true
{{- end -}}
{{- end -}}
