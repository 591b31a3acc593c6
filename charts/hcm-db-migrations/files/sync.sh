# PID 1 of the git-sync init container: runs "$@" (git-sync with its flags) in the pod's volume, which is the working directory.
# It exits with 0 even if git-sync failed, because Helm shows the log of the migrate container only: that one finds no
# checkout and prints ./git-error, git-sync's --error-file.
# REQUIRED has a line "<file> <source>" for each file that must exist, USERNAME_FILE contains the user name for HTTPS.
set -u
child=

# git-sync as PID 1, and a shell that waits for it in the foreground, would ignore SIGTERM until SIGKILL.
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; exit 143' TERM

missing=
while read -r file source; do
  [ -z "$file" ] || [ -s "$file" ] || missing="${missing:+$missing; }no value for $source in namespace \"$NAMESPACE\""
done <<EOF
$REQUIRED
EOF
if [ -n "$missing" ]; then
  echo "$missing" | tee git-error
  exit 0
fi

[ -z "$USERNAME_FILE" ] || set -- "$@" "--username=$(cat "$USERNAME_FILE")"
"$@" &
child=$!
wait "$child"
status=$?
if [ "$status" -ne 0 ] && [ ! -s git-error ]; then
  echo "git-sync failed with exit status $status, see its log" >git-error
fi
exit 0
