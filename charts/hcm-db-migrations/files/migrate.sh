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

# The reason in git-sync's error file, on one line without control characters. The file is JSON; its "Err" quotes git's
# output as Go does (%q): only that is the reason, without git's log of its requests. A server's message may not be UTF-8.
# User names, passwords and tokens in URLs (of a proxy, of a redirect) are not printed.
git_error() {
  [ ! -s "$1" ] || { python3 -I -c '
import json, re, sys
said = open(sys.argv[1], "rb").read()
try:
    error = json.loads(said)
    said = (error["Err"] or error["Msg"]).encode(errors="replace")
except (ValueError, KeyError, TypeError, AttributeError):
    pass
codes = dict(zip(b"abfnrtv", b"\a\b\f\n\r\t\v"))
def unquoted(match):
    kind, digits = match[1][0], match[1][1:]
    if digits:
        return bytes([int(digits, 16)]) if kind == ord("x") else chr(int(digits, 16)).encode(errors="replace")
    return bytes([codes.get(kind, kind)])
def decoded(line):
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")
git = re.search(rb"stderr: \"((?:[^\"\\]|\\.)*)\" }\s*$", said, re.S)
git = re.sub(rb"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)", unquoted, git[1], flags=re.S) if git else said
lines = [line for line in git.split(b"\n") if line.strip() and not line.startswith(b"POST git-")]
text = "\n".join(map(decoded, lines)) or decoded(re.sub(rb": { stdout: \"\", stderr: .*", b"", said, flags=re.S))
text = re.sub(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.", "", text)
text = "".join(char if char.isprintable() else " " for char in text)
sys.stdout.buffer.write(" ".join(text.split()).encode())' "$1" || cat "$1"; } | sed 's#//[^/ ]*@#//#g'
}

# The first path in a requirements file, or in one that it includes, that leads out of the working directory to nothing.
outside_path() {
  python3 -I -c '
import os, re, sys
files = [sys.argv[1]]
for file in files:
    for line in open(file, errors="replace"):
        option, path = re.match(r"\s*(-[rce]|--requirement|--constraint|--editable|)[\s=]*(?:file:)?([^\s#;\[]*)", line).groups()
        includes = option[:3] in ("-r", "-c", "--r", "--c")
        path = os.path.normpath(os.path.join(os.path.dirname(file) if includes else "", path.strip("\"\x27")))
        if not os.path.exists(path) and path.startswith(".."):
            sys.exit(print(path))
        if includes and os.path.isfile(path) and path not in files:
            files.append(path)' "$1" 2>/dev/null
}

if [ ! -d git/code ]; then
  reason=$(git_error git-error)
  [ -n "$reason" ] || reason='the clone was interrupted'
  case $(cat git-error 2>/dev/null) in # the reason has not all of it
  *'No space left on device'*) ;;
  # 6: without libgcc_s, as in git-sync's image, git aborts when a program that it writes to was killed.
  *'signal: killed'* | *'signal 9'* | *'signal 6'* | *'status 137'*)
    reason="$reason; most likely out of memory: raise \"git.resources.limits.memory\"" ;;
  *'unadvertised object'*'promisor remote'* | *'not our ref'*'promisor remote'* | *' not valid'*'promisor remote'*)
    reason="$reason; the server does not support partial clones: set \"git.filter\" to \"\"" ;;
  *'unadvertised object'*)
    reason="$reason; the server serves no commit by its SHA: set \"git.branch\" to a branch or tag" ;;
  *'context deadline exceeded'*)
    reason="$reason; if the network is slow, raise \"job.activeDeadlineSeconds\"" ;;
  esac
  case $reason in
  'the clone was interrupted'* | 'git-sync failed'*) # no reason recorded, perhaps because the volume is full
    full=$(head -c 65536 /dev/zero | tee probe 2>&1 >/dev/null)
    [ -z "$full" ] || reason="$reason; the pod's volume cannot be written:${full##*:}"
    reason="$reason; for git-sync's log: kubectl logs ${HOSTNAME:-<pod>} -c git-sync -n $NAMESPACE" ;;
  esac
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

# git-sync checks out neither a submodule nor, outside of git.path, what a symlink points to.
if [ ! -f "git/code/$GIT_PATH/${ALEMBIC_CONFIG:-alembic.ini}" ]; then
  submodule=$(sed -n 's#^[[:space:]]*path[[:space:]]*=[[:space:]]*##p' git/code/.gitmodules 2>/dev/null |
    while read -r path; do case $GIT_PATH/ in ("${path%/}"/*) echo "${path%/}" ;; esac; done)
  [ -z "$submodule" ] ||
    fail 255 "\"$submodule\" is a submodule in commit $commit, and submodules are not cloned: set \"git.repo\" to the submodule's repository, and \"git.path\" to the folder in it" "Git access"
  [ -d "git/code/$GIT_PATH" ] || [ ! -L "git/code/$GIT_PATH" ] ||
    fail 255 "\"$GIT_PATH\" is a symbolic link to $(readlink "git/code/$GIT_PATH") in commit $commit: set \"git.path\" to that folder" "Git access"
fi
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
  outside=$([ "$status" -eq 0 ] || outside_path "$REQUIREMENTS")
  [ -z "$outside" ] ||
    fail 255 "pip could not install $REQUIREMENTS: it refers to \"$outside\", which is outside of \"git.path\" and not checked out: move it into \"$GIT_PATH\"" "Git access"
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
