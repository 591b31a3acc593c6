# PID 1 of the migrate container: logs the commit, checks the credentials, installs the requirements, and runs Alembic
# with "$@". The working directory is the pod's volume, where git-sync left ./git/code or ./git-error.
# NAMESPACE, GIT_REPO, GIT_REF, GIT_PATH and REQUIREMENTS are the chart's values. REQUIRED has a line "<variable> <source>"
# for each variable that must have a value. EXPECTED, if set, must be in Alembic's output.
# Exit status: Alembic's; of this script, 255 (as Alembic's) for a failure that is not retryable, 143 after SIGTERM, else 1.
set -u
exec 2>&1 # a container's log may interleave two streams, and the reason would not be the last line
workspace=$PWD child='' stopped='' interrupted='' stage='starting' effect='the database was not contacted'

fail() {
  printf 'FAILED: %s (README.md of the chart, "%s")\n' "$2" "$3" >&2
  exit "$1"
}

# As PID 1, neither this shell nor a program without its own handler exits on SIGTERM: it would run until SIGKILL.
stop() {
  [ -n "$stopped" ] ||
    echo "stopped by SIGTERM while $stage; $effect; if the Job's deadline was exceeded, raise \"job.activeDeadlineSeconds\" and Helm's --timeout together" >&2
  stopped=yes interrupted=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM

# Run a program and return its exit status. A signal interrupts wait, not the program: wait is then called again, and
# returns 127 if it has already returned the status. dash would print "Terminated" there.
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

# git-sync's error file is JSON, and its "Err" quotes git's output: only that is the reason, without git's log of its
# requests. Passwords in its URLs (of a proxy, of a redirect) are not printed.
git_error() {
  [ -s git-error ] || { echo "the clone was interrupted" && return; }
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
[ -z "$missing" ] || fail 1 "no value for $missing: create it in namespace \"$NAMESPACE\", or point \"db\" or \"extraEnv\" to it" "Database"

cd "git/code/$GIT_PATH" 2>/dev/null || fail 255 "no folder \"$GIT_PATH\" in commit $commit: set \"git.path\" to the folder with alembic.ini" "Git access"
[ -f "${ALEMBIC_CONFIG:-alembic.ini}" ] ||
  fail 255 "no ${ALEMBIC_CONFIG:-alembic.ini} in \"$GIT_PATH\" of commit $commit: set \"git.path\" to the folder that contains it" "Git access"

if [ -n "$REQUIREMENTS" ]; then
  stage="installing $REQUIREMENTS"
  [ -f "$REQUIREMENTS" ] ||
    fail 255 "no $REQUIREMENTS in \"$GIT_PATH\" of commit $commit: set \"requirements\" to its name, or to \"\" if the image already contains the dependencies" "Requirements"
  # An unreachable index is reported within seconds, not after pip's default of five retries of 15 s each.
  export PIP_RETRIES="${PIP_RETRIES:-2}" PIP_TIMEOUT="${PIP_TIMEOUT:-10}"
  # -I: ignores a logging.py or pip.py in the checkout.
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
  fail 255 "alembic is not installed: add it to \"requirements\" ($REQUIREMENTS), or to the image if that is \"\"" "Requirements"

stage="running alembic $*" effect='PostgreSQL rolls back what was not committed'
if [ -z "${EXPECTED-}" ]; then
  run alembic "$@"
else
  run alembic "$@" >"$workspace/output"
  cat "$workspace/output"
  [ "$status" -ne 0 ] || grep -qF -- "$EXPECTED" "$workspace/output" ||
    fail 1 "alembic $* did not report \"$EXPECTED\": the database is not at the current head of \"$GIT_REF\"; run helm upgrade" "helm test"
fi
[ "$status" -ne 137 ] || echo "FAILED: alembic was killed, most likely out of memory: raise \"resources.limits.memory\"" >&2
exit "$status"
