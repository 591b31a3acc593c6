# PID 1 of the git-sync init container: runs "$@" (git-sync with its flags) in the pod's volume, which is the working directory.
# It exits with 0 even if git-sync failed, because Helm shows the log of the migrate container only: that one finds no
# checkout and prints ./git-error, git-sync's --error-file.
# REQUIRED has a line "<file> <source>" for each file that must not be empty, USERNAME_FILE contains the user name for HTTPS,
# CLONE_SECONDS is the time limit of all attempts together.
set -u
[ ! -f report ] || exit 0 # of several targets: this pod migrates none (rollout.py)
child=

# git-sync as PID 1, and a shell that waits for it in the foreground, would ignore SIGTERM until SIGKILL.
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; exit 143' TERM

missing=
while read -r file source; do
  [ -n "$file" ] || continue
  # git-sync would report a user name of white space as a missing flag. A file that cannot be read is left to git's words.
  case $([ ! -s "$file" ] || cat "$file" 2>/dev/null || echo unreadable) in
  *[![:space:]]*) ;;
  *) missing="${missing:+$missing; }no value for $source in namespace \"$NAMESPACE\"" ;;
  esac
done <<EOF
$REQUIRED
EOF
if [ -n "$missing" ]; then
  echo "$missing" | tee git-error
  exit 0
fi

[ -z "$USERNAME_FILE" ] || set -- "$@" "--username=$(cat "$USERNAME_FILE")"
# At its --sync-timeout, git-sync kills git, and then waits without a limit for git's children (ssh, git-remote-https).
if command -v timeout >/dev/null; then
  set -- timeout -k 5 "$CLONE_SECONDS" "$@"
else
  echo "the image has no program \"timeout\": only the deadline ends a clone from a git server that does not respond" >&2
fi
start=$(date +%s)
"$@" &
child=$!
wait "$child"
status=$?
# timeout exits with 124, or as killed by its signal (after SIGKILL, and BusyBox's always). Before its time, others killed git-sync.
# git-error may have the reason of an attempt before.
if { [ "$status" -eq 124 ] || [ "$status" -gt 128 ]; } && [ "$(($(date +%s) - start))" -ge "$CLONE_SECONDS" ]; then
  echo "the clone did not finish within $CLONE_SECONDS s: the git server does not respond, a firewall, NetworkPolicy or proxy" \
    "drops the packets, or the network is too slow (then raise \"job.activeDeadlineSeconds\")" | tee timed-out
elif [ "$status" -ne 0 ] && [ ! -s git-error ]; then
  echo "git-sync failed with exit status $status" >git-error
fi
exit 0
