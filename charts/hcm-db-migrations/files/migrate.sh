# PID 1 of the migrate container: logs the commit, checks the credentials, installs the requirements, and runs Alembic
# with "$@". The working directory is the pod's volume, where git-sync left ./git/code or ./git-error.
# NAMESPACE, GIT_REPO, GIT_REF, GIT_PATH and REQUIREMENTS are the chart's values. REQUIRED has a line "<variable> <source>"
# for each variable that must have a value. EXPECTED, if set, must be in Alembic's output.
# A pod of several targets has ./target or ./report from its container "rollout" (rollout.py), and in /etc/target the variables that
# differ from the chart's.
# Exit status: Alembic's; of this script, 255 (as Alembic's) for a failure that is not retryable, 143 after SIGTERM, else 1.
set -u
exec 2>&1 # a container's log may interleave two streams, and the reason would not be the last line
workspace=$PWD target='' sources='' said='' child='' stopped='' interrupted='' output='' stage='starting' effect='the database was not contacted'

# Makes $1 the container's termination message: it is what Argo CD and kubectl describe show, without the log. kubelet cuts
# off the beginning of a longer one. Of a target, its first line is the database's revision before and after the run.
set_termination_message() {
  [ ! -w /dev/termination-log ] || {
    [ -z "$target" ] || printf 'position: %s\n' "$([ -s "$POSITION_FILE" ] && cat "$POSITION_FILE" || echo ' -> ')"
    printf '%s' "$1"
  } | head -c 4096 >/dev/termination-log
}

# Prints $1, a line that may be the last one.
say() {
  said=$1
  printf '%s\n' "$said" >&2
  set_termination_message "$said"
}

fail() {
  say "FAILED: $2 (README.md of the chart, \"$3\")"
  exit "$1"
}

# As PID 1, neither this shell nor a program without its own handler exits on SIGTERM: it would run until SIGKILL.
stop() {
  [ -n "$stopped" ] ||
    say "stopped by SIGTERM while $stage; $effect; if the Job's deadline was exceeded, raise \"job.activeDeadlineSeconds\" and Helm's --timeout together"
  stopped=yes interrupted=yes
  [ -z "$child" ] || terminate
}
trap stop TERM

# A child that is still this shell, before it becomes the program, would lose the signal.
terminate() {
  sleep 0.1
  kill -TERM "$child" 2>/dev/null
}

# Run a program and return its exit status; after SIGTERM, none is started. A signal interrupts wait, not the program: wait
# is then called again, and returns 127 (bash also -1) if it has already returned the status. dash would print "Terminated".
run() {
  status=143
  [ -z "$stopped" ] || return "$status"
  "$@" &
  child=$!
  [ -z "$stopped" ] || terminate
  wait "$child" 2>/dev/null
  status=$?
  while [ -n "$interrupted" ]; do
    interrupted=''
    wait "$child" 2>/dev/null
    again=$?
    case $again in 127 | -1) ;; *) status=$again ;; esac
  done
  child=''
  return "$status"
}

# As run, with a copy of the output in ./log, and standard output in the file $output if that is set. tee is waited for, since
# a slow reader of the log would lose its end; but for at most a second if the program has left another one running, which
# has the pipe open, or after SIGTERM.
run_logged() {
  rm -f "$workspace/log" "$workspace/log-complete" "$workspace/pipe"
  mkfifo "$workspace/pipe" || fail 1 "no file can be created in the pod's volume (reason above): free disk space on the node, or make the repository smaller" "Git access"
  { tee "$workspace/log"; : >"$workspace/log-complete"; } <"$workspace/pipe" 2>/dev/null &
  run into_pipe "$@"
  attempts=10
  while [ ! -e "$workspace/log-complete" ] && [ "$attempts" -gt 0 ]; do
    sleep 0.1
    true <>"$workspace/pipe" # tee would wait for a program that was stopped before it opened the pipe
    open=$(ls -l /proc/[0-9]*/fd 2>/dev/null | grep " -> $workspace/pipe$")
    case $stopped$open in
    yes* | *l-w*) attempts=$((attempts - 1)) ;;
    *lr-*) ;;  # tee, which writes the rest
    *) break ;; # tee was killed, too
    esac
  done
  return "$status"
}

into_pipe() { exec "$@" >"${output:-$workspace/pipe}" 2>"$workspace/pipe"; }

# The last line of the log $1 that has a reason: "FAILED: ...", or the exception that ends one of Python's tracebacks. The
# lines of an exception group start with + or |.
last_reason() {
  sed -n -e 's/^ *[+|] //' -e 's/^ *\(FAILED: \)/\1/p' -e '/Traceback (most recent call last):$/,/^[^[:space:]]/{
    /Traceback (most recent call last):$/d; /^[[:space:]]/d; /:[[:space:]]*$/{ $!N; s/[[:space:]]*\n[[:space:]]*/ /; }; p; }' "$1" | tail -n 1 | tr -d '[:cntrl:]'
}

# Whether $1 is a file of the checkout: through a symlink, a commit could show any file of the container. An absolute
# path is not the commit's.
in_checkout() {
  [ -e "$1" ] || [ -L "$1" ] || return 0
  case $1 in /*) return 0 ;; esac
  [ ! -L "$1" ] && case $(readlink -f -- "$1") in "$checkout"/*) ;; *) false ;; esac
}

# The paths of the repository's submodules, which git-sync does not clone.
submodules() { sed -n 's#^[[:space:]]*path[[:space:]]*=[[:space:]]*##p' "$workspace/git/code/.gitmodules" 2>/dev/null; }

# What is in the folder $1, the working directory, only as a name: submodules, and symlinks out of git.path.
not_checked_out() {
  folder="${1#.}"
  {
    submodules | while read -r path; do case $path in ("${folder:+$folder/}"*) printf '%s, ' "${path#"${folder:+$folder/}"}" ;; esac; done
    find . -type l -exec sh -c 'for link; do [ -e "$link" ] || printf "%s, " "$link"; done' sh {} + 2>/dev/null
  } | tr -d '[:cntrl:]' | head -c 2000
}

# Prints "outside <path>" for a path in the requirements file $1, or in a file that it includes, that is not in the
# checkout, and "unhashed" if pip checks no hashes: it does if any requirement has one. pip would print what is not a
# requirement in an included file, such as the environment in /proc.
requirements_problem() {
  python3 -I -c '
import os, re, sys
checkout, files, options = sys.argv[2], [sys.argv[1]], ""
for file in files:
    # As pip: a continued line is joined before a comment is cut off.
    text = open(file, errors="replace").read()
    text = re.sub(r"(?m)^(?![ \t]*#)((?:.*\\\n)+)", lambda lines: lines[1].replace("\\\n", ""), text)
    for line in map(str.strip, re.sub(r"(?m)(^|\s)#.*$", "", text).splitlines()):
        options += " ".join(re.findall(r"(?<=\S )\s*--hash\b|--(?:no-)?require-hashes", line)) + " "
        for option, path in re.findall(r"(?:^|\s)(-[rce]|--requirement|--constraint|--editable|^(?!-))[\s=]*(?:file:/*(?=/))?(?:file:)?([^\s#;\[]*)", line):
            includes = option[:3] in ("-r", "-c", "--r", "--c")
            path = re.sub(r"^([\"\x27])(.*)\1$", r"\2", path)
            if re.search(r"[\"\x27\\$]", path):
                continue # only pip knows which file that is
            path = os.path.normpath(os.path.join(os.path.dirname(file) if includes else "", path))
            exists = os.path.exists(path) or (not includes and not path.startswith(".."))
            real = f"{os.path.realpath(path)}/"
            inside = real.startswith(f"{checkout}/") and exists
            if re.match("/(proc|sys|dev)/", real) or not (inside or os.path.isabs(path) or ":/" in path):
                sys.exit(print("outside", path))
            if includes and os.path.isfile(path) and path not in files:
                files.append(path)
if "hash" not in options or "--no-require-hashes" in options:
    print("unhashed")' "$1" "$checkout" 2>/dev/null || echo unhashed
}

# To build a package, pip would run its code and what the index serves as its build dependencies, which no hash covers. pip
# builds a folder, an archive or a repository even with --only-binary: the venv's Python then runs nothing but pip. Sets
# pip's option.
forbid_builds() {
  build=--no-binary=${PIP_NO_BINARY-}
  case $(printf '%s' "${PIP_NO_BINARY-}" | tr -d ' ,') in
  '' | :none:) build=--no-build-isolation ;;
  *) return 0 ;;
  esac
  for folder in "$workspace"/venv/lib/python3*/site-packages; do
    echo 'import sys; any("__pip-runner__" in word for word in sys.orig_argv[:2]) or sys.exit("only wheels are installed")' >"$folder/only-wheels.pth"
  done
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

if [ -f report ]; then
  cat report
  set_termination_message "$(tail -n 1 report)"
  exit "$(cat report-status)"
elif [ -f target ]; then
  . ./target
  for file in /etc/target/*; do
    [ ! -f "$file" ] || { value=$(cat "$file" && echo .) && export "${file##*/}=${value%.}"; } # with its newlines, as a reference
  done
  export POSITION_FILE="$workspace/position"
  printf '%s\n' "target $target ($number)"
  set_termination_message '' # without one, kubelet would take the log's end for that of a killed container
fi

if [ ! -d git/code ]; then
  reason=$(git_error git-error)
  [ ! -s timed-out ] || reason="$(cat timed-out)${reason:+; an attempt before: $reason}"
  [ -n "$reason" ] || reason='the clone was interrupted'
  case $(cat git-error 2>/dev/null) in # the reason has not all of it
  *'No space left on device'*) ;;
  # 6: without libgcc_s, as in git-sync's image, git aborts when a program that it writes to was killed.
  *'signal: killed'* | *'signal 9'* | *'signal 6'* | *'status 137'*)
    reason="$reason; most likely out of memory: raise \"git.resources.limits.memory\"" ;;
  *"filter 'blob:none' not supported"* | *'unadvertised object'*'promisor remote'* | *'not our ref'*'promisor remote'* | *' not valid'*'promisor remote'*)
    reason="$reason; the server does not support partial clones: set \"git.filter\" to \"\"" ;;
  *'unadvertised object'*)
    reason="$reason; the server serves no commit by its SHA: set \"git.branch\" to a branch or tag" ;;
  *'Authentication failed'* | *'could not read Username'*)
    reason="$reason; for a private repository, set \"git.httpsSecretName\" to a Secret with a valid token" ;;
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
export GIT_COMMIT="$commit" # with GIT_REPO and GIT_REF, for the runner's record
printf '%s\n' "code: repository $GIT_REPO, ref $GIT_REF, commit $commit, path $GIT_PATH"

missing='' theirs=''
while read -r name source; do
  [ -z "$(printenv "$name")" ] || continue
  [ -z "$target" ] || theirs=$(printf '%s\n' "$sources" | sed -n "s/^$name //p")
  missing="${missing:+$missing, }$name (${theirs:-$source})"
done <<EOF
$REQUIRED
EOF
[ -z "$missing" ] || fail 1 "no value for $missing: create it in namespace \"$NAMESPACE\", or point \"db\"${target:+, the target} or \"extraEnv\" to it" "Database"

# git-sync checks out neither a submodule nor, outside of git.path, what a symlink points to.
if [ ! -f "git/code/$GIT_PATH/${ALEMBIC_CONFIG:-alembic.ini}" ]; then
  submodule=$(submodules | while read -r path; do case $GIT_PATH/ in ("${path%/}"/*) echo "${path%/}" ;; esac; done)
  [ -z "$submodule" ] ||
    fail 255 "\"$submodule\" is a submodule in commit $commit, and submodules are not cloned: set \"git.repo\" to the submodule's repository, and \"git.path\" to the folder in it" "Git access"
  [ -d "git/code/$GIT_PATH" ] || [ ! -L "git/code/$GIT_PATH" ] ||
    fail 255 "\"$GIT_PATH\" is a symbolic link to $(readlink "git/code/$GIT_PATH") in commit $commit: set \"git.path\" to that folder" "Git access"
fi
checkout=$(cd git/code && pwd -P)
cd "git/code/$GIT_PATH" 2>/dev/null || fail 255 "no folder \"$GIT_PATH\" in commit $commit: set \"git.path\" to the folder with alembic.ini" "Git access"
case $(pwd -P)/ in
"$checkout"/*) ;;
*) fail 255 "folder \"$GIT_PATH\" of commit $commit leads out of the repository through a symlink: commit the folder itself" "Git access" ;;
esac
in_checkout "${ALEMBIC_CONFIG:-alembic.ini}" ||
  fail 255 "${ALEMBIC_CONFIG:-alembic.ini} in \"$GIT_PATH\" of commit $commit is a symlink, which is not followed: commit the file itself" "Git access"
[ -f "${ALEMBIC_CONFIG:-alembic.ini}" ] ||
  fail 255 "no ${ALEMBIC_CONFIG:-alembic.ini} in \"$GIT_PATH\" of commit $commit: set \"git.path\" to the folder that contains it" "Git access"

if [ -n "$REQUIREMENTS" ]; then
  stage="installing $REQUIREMENTS"
  in_checkout "$REQUIREMENTS" ||
    fail 255 "$REQUIREMENTS in \"$GIT_PATH\" of commit $commit is a symlink, which is not followed: commit the file itself" "Requirements"
  [ -f "$REQUIREMENTS" ] ||
    fail 255 "no $REQUIREMENTS in \"$GIT_PATH\" of commit $commit: set \"requirements\" to its name, or to \"\" if the image already contains the dependencies" "Requirements"
  problem=$(requirements_problem "$REQUIREMENTS")
  case $problem in
  unhashed) printf '%s\n' "WARNING: $REQUIREMENTS has no hashes, so pip installs whatever the index serves: add them (uv pip compile or pip-compile with --generate-hashes); PIP_REQUIRE_HASHES=1 in \"extraEnv\" refuses a file without them (README.md of the chart, \"Requirements\")" ;;
  outside*) fail 255 "$REQUIREMENTS refers to \"${problem#outside }\", which is not in the checkout: only \"git.path\" is, so add it to \"$GIT_PATH\"" "Requirements" ;;
  esac
  # An unreachable index is reported within seconds, not after pip's default of five retries of 15 s each.
  export PIP_RETRIES="${PIP_RETRIES:-2}" PIP_TIMEOUT="${PIP_TIMEOUT:-10}"
  # -I: ignores a logging.py or pip.py in the checkout.
  run python3 -I -m venv --without-pip "$workspace/venv" && forbid_builds &&
    run_logged python3 -I -m pip --python "$workspace/venv/bin/python3" --quiet --no-input --disable-pip-version-check \
      install --no-compile --no-cache-dir --only-binary :all: "$build" -r "$REQUIREMENTS"
  status=$?
  [ -z "$stopped" ] || exit 143
  case $status in
  137 | 247) fail 1 "killed while $stage, most likely out of memory: raise \"resources.limits.memory\"" "Requirements" ;; # 247: pip's child
  esac
  if [ "$status" -ne 0 ]; then
    reason="pip could not install $REQUIREMENTS (exit status $status, reason above)"
    ! grep -qE 'No matching distribution|only wheels are installed' "$workspace/log" 2>/dev/null || grep -q 'Retrying' "$workspace/log" ||
      fail 1 "$reason: only wheels are installed; add the missing wheel to the index, or name the package in PIP_NO_BINARY in \"extraEnv\": its code and its build dependencies' then run with the credentials" "Requirements"
    fail 1 "$reason: for a mirror, proxy or private CA set \"extraEnv\"" "Requirements"
  fi
  rm -f "$workspace"/venv/lib/python3*/site-packages/only-wheels.pth
  PATH=$workspace/venv/bin:$PATH
fi
command -v alembic >/dev/null ||
  fail 255 "alembic is not installed: add it to \"requirements\" ($REQUIREMENTS), or to the image if that is \"\"" "Requirements"

absent=$(not_checked_out "$GIT_PATH")
[ -z "$absent" ] ||
  printf '%s\n' "WARNING: not checked out: ${absent%, } (submodules are not cloned, and symlinks must lead to a file in \"git.path\"); revisions there are missing (README.md of the chart, \"Git access\")"

[ -z "$stopped" ] || exit 143
stage="running alembic $*" effect='PostgreSQL rolls back what was not committed'
output=${EXPECTED:+$workspace/output}
run_logged alembic "$@"
if [ -n "$output" ]; then
  cat "$output" 2>/dev/null # SIGTERM may come before it exists
  [ "$status" -ne 0 ] || grep -qF -- "$EXPECTED" "$output" ||
    fail 1 "alembic $* did not report \"$EXPECTED\": the database is not at the current head of \"$GIT_REF\"; run helm upgrade" "helm test"
fi
reason=$([ "$status" -eq 0 ] || tail -n 1 "$workspace/log" 2>/dev/null)
[ "$status" -eq 0 ] && [ -z "$target" ] || set_termination_message "${reason:-$said}"
case $status in
137)
  sleep 1 # a container runtime that is busy misses the kill if the container ends at once: `Error` instead of `OOMKilled`
  say "FAILED: alembic was killed, most likely out of memory: raise \"resources.limits.memory\""
  ;;
1) # Python's for an exception that env.py does not handle
  reason=$(last_reason "$workspace/log")
  case $reason in
  '' | FAILED:*) ;;
  *)
    [ -z "$(tail -c 1 "$workspace/log")" ] || echo
    say "FAILED: alembic $*: $reason (exit status 1)"
    ;;
  esac
  ;;
esac
case ${target:+$status} in 253 | 254) status=1 ;; esac # those are the report's
exit "$status"
