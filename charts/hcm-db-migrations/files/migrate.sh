# PID 1 of the container "migrate": says what code it has, checks the credentials, installs the requirements, and runs
# Alembic with "$@". The working directory is the pod's volume, where git-sync left ./git/code or ./git-error.
# NAMESPACE, GIT_REPO, GIT_REF, GIT_PATH and REQUIREMENTS are the chart's values. REQUIRED has a line "<variable> <where it comes from>"
# for each variable that must have a value. EXPECTED, if any, must be in what Alembic prints.
# Exit status: Alembic's own; 255 (Alembic's, too) when a retry cannot mend it; 143 after SIGTERM; else 1.
set -u
exec 2>&1 # of two streams, a container's log may have the lines in another order, and the reason not last
workspace=$PWD child='' stopped='' interrupted='' stage='starting' effect='the database was not contacted'

fail() {
  printf 'FAILED: %s (README.md of the chart, "%s")\n' "$2" "$3" >&2
  exit "$1"
}

# As PID 1, neither this shell nor a program without a handler of its own would end at SIGTERM before it is killed.
stop() {
  [ -n "$stopped" ] ||
    echo "stopped by SIGTERM while $stage; $effect; if it was the time limit, raise \"job.activeDeadlineSeconds\" and Helm's --timeout" >&2
  stopped=yes interrupted=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM

# Run a program and return its exit status. A signal ends wait early, not the program: then wait is called again, and knows
# nothing (127) if it had the status already. dash would say "Terminated" there.
run() {
  "$@" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child"
  wait "$child"
  status=$?
  while [ -n "$interrupted" ]; do
    interrupted=''
    wait "$child" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || status=$again
  done
  child=''
  return "$status"
}

# git-sync's error file is JSON, and its "Err" quotes what git wrote: that alone is the reason, without the requests that
# it tells of. Passwords in its addresses (a proxy's, a redirection's) are not printed.
git_error() {
  [ -s git-error ] || { echo "the clone was cut off" && return; }
  { python3 -c '
import json
text, said = open("git-error", errors="replace").read(), ""
try:
    text = json.loads(text)["Err"] or text
    said = json.loads(text.rpartition("stderr: ")[2].rpartition(" }")[0])
except (ValueError, KeyError, TypeError):
    pass
lines = [line for line in said.splitlines() if not line.startswith("POST git-")]
print(" ".join(" ".join(lines or text.splitlines()).split()))' || cat git-error; } | sed 's#//[^/: ]*:[^/ ]*@#//#g'
}

if [ ! -d git/code ]; then
  reason=$(git_error)
  ! grep -qE 'signal: killed|signal 9|status 137' git-error 2>/dev/null ||
    reason="$reason; most likely out of memory: raise \"git.resources.limits.memory\""
  fail 1 "no checkout of \"$GIT_REF\" from \"$GIT_REPO\": $reason" "Git access"
fi
commit=$(basename "$(readlink git/code)")
echo "code: repository $GIT_REPO, ref $GIT_REF, commit $commit, path $GIT_PATH"

missing=
while read -r name source; do
  [ -n "$(printenv "$name")" ] || missing="${missing:+$missing, }$name ($source)"
done <<EOF
$REQUIRED
EOF
[ -z "$missing" ] || fail 1 "no value for $missing: create it in namespace \"$NAMESPACE\", or set \"db\" or \"extraEnv\" to where it is" "Database"

cd "git/code/$GIT_PATH" 2>/dev/null || fail 255 "no folder \"$GIT_PATH\" in commit $commit: set \"git.path\" to the one with alembic.ini" "Git access"
[ -f "${ALEMBIC_CONFIG:-alembic.ini}" ] ||
  fail 255 "no ${ALEMBIC_CONFIG:-alembic.ini} in \"$GIT_PATH\" of commit $commit: set \"git.path\" to the folder that has it" "Git access"

if [ -n "$REQUIREMENTS" ]; then
  stage="installing $REQUIREMENTS"
  [ -f "$REQUIREMENTS" ] ||
    fail 255 "no $REQUIREMENTS in \"$GIT_PATH\" of commit $commit: set \"requirements\" to its name, or to \"\" if the image brings all" "Requirements"
  # A dead index is told in seconds, not after pip's own five tries of 15 s.
  export PIP_RETRIES="${PIP_RETRIES:-2}" PIP_TIMEOUT="${PIP_TIMEOUT:-10}"
  # -I: a logging.py or pip.py in the checkout is not meant.
  run python3 -I -m venv --without-pip "$workspace/venv" &&
    run python3 -I -m pip --python "$workspace/venv/bin/python3" --quiet --no-input --disable-pip-version-check \
      install --no-compile --no-cache-dir -r "$REQUIREMENTS"
  status=$?
  [ -z "$stopped" ] || exit 143
  case $status in
  137 | 247) fail 1 "killed while $stage, most likely out of memory: raise \"resources.limits.memory\"" "Requirements" ;; # 247: pip's child
  esac
  [ "$status" -eq 0 ] ||
    fail 1 "pip could not install $REQUIREMENTS (exit status $status, reason above): for a mirror, proxy or private CA set \"extraEnv\"" "Requirements"
  PATH=$workspace/venv/bin:$PATH
fi
command -v alembic >/dev/null ||
  fail 255 "no alembic to run: add it to \"requirements\" ($REQUIREMENTS), or to the image if that is \"\"" "Requirements"

stage="running alembic $*" effect='PostgreSQL rolls back what was not committed'
if [ -z "${EXPECTED-}" ]; then
  run alembic "$@"
else
  run alembic "$@" >"$workspace/output"
  cat "$workspace/output"
  [ "$status" -ne 0 ] || grep -qF -- "$EXPECTED" "$workspace/output" ||
    fail 1 "alembic $* did not say \"$EXPECTED\": the database is not at the head of \"$GIT_REF\" as it is now; run helm upgrade" "helm test"
fi
[ "$status" -ne 137 ] || echo "FAILED: alembic was killed, most likely out of memory: raise \"resources.limits.memory\"" >&2
exit "$status"
