# The init container "rollout" of a pod of several targets (an Indexed Job): decides what the pod does, and writes it for migrate.sh,
# in the pod's volume, which is the working directory. It is the only container with access to the Kubernetes API.
# - ./target: the variables of the index's target, as a shell script.
# - ./report and ./report-status: what the pod prints and its exit code, instead of a migration. It is the report if the index is
#   the last one, or if more than MAX_FAILURES targets have failed, and no target runs any more.
# /etc/targets/list has the targets: [name, schema, port, [ConfigMap, its keys], [Secret, its keys]], JOB's from FIRST on, COUNT of
# them. An empty MAX_FAILURES is no limit. SECONDS is the pod's deadline.
import calendar
import collections
import json
import os
import re
import shlex
import signal
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

NOT_RETRYABLE, CONTINUES, STOPPED = 255, 253, 254  # exit codes, in the Job's podFailurePolicy
SEE = '(README.md of the chart, "Many databases")'
environment = os.environ
namespace, job, me = (environment[name] for name in ("NAMESPACE", "JOB", "POD"))
first, count, index = (int(environment[name]) for name in ("FIRST", "COUNT", "JOB_COMPLETION_INDEX"))
max_failures = int(environment["MAX_FAILURES"] or sys.maxsize)
end = time.monotonic() + int(environment["SECONDS"]) * 0.8
with open("/etc/targets/list") as file:
    targets = json.load(file)
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # PID 1 would ignore it


def write(name, text):
    with open(name, "w") as file:
        file.write(text)


def finish(text, status):
    write("report-status", str(status))
    write("report", text)
    sys.exit()


def api(path, **query):
    """An object of the API. Right after the Role was created, its rights may be missing; the API server may restart."""
    host = environment["KUBERNETES_SERVICE_HOST"]
    address = f"[{host}]" if ":" in host else host
    url = f"https://{address}:{environment['KUBERNETES_SERVICE_PORT']}{path}?{urllib.parse.urlencode(query)}"
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile="/etc/api/ca.crt")),
    )
    latest = min(time.monotonic() + 30, end)
    while True:
        try:
            with open("/etc/api/token") as file:
                request = urllib.request.Request(url, headers={"Authorization": f"Bearer {file.read()}"})
            with opener.open(request, timeout=10) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            if time.monotonic() > latest:
                unavailable(error)
            print(f"the Kubernetes API: {error}", flush=True)
            time.sleep(1)


def unavailable(error):
    if getattr(error, "code", None) in (401, 403):
        fix = "its ServiceAccount must be able to get jobs and list pods in the namespace"
        finish(
            f"FAILED: the Kubernetes API refuses to show the Job and its pods ({error}): {fix} {SEE}\n", NOT_RETRYABLE
        )
    fix = 'allow connections to it, or set "rollout.maxFailures" to null, which needs none'
    finish(f"FAILED: the Kubernetes API cannot be asked for the Job's state ({error}): {fix} {SEE}\n", 1)


def pods(of, **query):
    query |= {"labelSelector": f"batch.kubernetes.io/job-name={of}", "limit": 50}
    while True:
        page = api(f"/api/v1/namespaces/{namespace}/pods", **query)
        yield from page["items"]
        if not page["metadata"].get("continue"):
            return
        query["continue"] = page["metadata"]["continue"]


def index_of(pod):
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def container(pod, name):
    """The state of a container: {"waiting" | "running" | "terminated": {...}}, or {}."""
    status = pod["status"]
    found = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
    return next((each["state"] for each in found if each["name"] == name), {})


def indexes(text):
    """The indexes of a Job's status, such as "1,3-5"."""
    ranges = [part.split("-") for part in (text or "").split(",") if part]
    return {each for part in ranges for each in range(int(part[0]), int(part[-1]) + 1)}


def status():
    """The indexes that succeeded, and those that failed. Kubernetes 1.28 has no failed ones: one failure ends the Job there."""
    found = api(f"/apis/batch/v1/namespaces/{namespace}/jobs/{job}").get("status", {})
    return indexes(found.get("completedIndexes")), indexes(found.get("failedIndexes"))


def is_my_turn_to_report():
    """Whether all targets are done; or, of a rollout that stops, no target runs, and this pod is the first one that waits."""
    succeeded, failed = status()
    if len(failed) <= max_failures:
        return (succeeded | failed).issuperset(range(count))
    others = [pod for pod in pods(job, fieldSelector="status.phase!=Succeeded,status.phase!=Failed")]
    others = [pod for pod in others if pod["metadata"]["name"] != me]
    waiting = [index_of(pod) for pod in others if "running" in container(pod, "rollout")]
    running = [pod for pod in others if "terminated" in container(pod, "rollout")]
    return not running and index < min(waiting, default=count + 1)


def wait_and_report():
    while not is_my_turn_to_report():
        if time.monotonic() > end:
            finish("other targets are still running; the report continues in another pod\n", CONTINUES)
        time.sleep(1)
    report()


def reason(pod, message):
    """Why a pod failed, in one line."""
    state = container(pod, "migrate").get("terminated", {})
    stuck = [
        f"{each['name']}: {each['state']['waiting']['reason']}"
        for each in pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        if each["state"].get("waiting", {}).get("reason") not in (None, "PodInitializing")
    ]
    ended = [state.get("reason", ""), f"exit code {state['exitCode']}"] if state else []
    found = [message] if message else [pod["status"].get("reason", ""), *ended, *stuck]
    return ", ".join(filter(None, found)) or "unknown"


def row(name, pod, is_done=False, has_failed=False):
    """(name, before, after, seconds, result) of a target: its newest pod's, else what its Job says."""
    phase = (
        pod["status"]["phase"]
        if pod
        else {(True, False): "Succeeded", (False, True): "Failed"}.get((is_done, has_failed))
    )
    if phase not in ("Succeeded", "Failed"):
        return name, "", "", "", "not started"
    before, after, message = said(pod) if pod else ("", "", "its pod was deleted")
    result = "done" if not before else "unchanged" if before == after else "migrated"
    return name, before, after, seconds(pod), result if phase == "Succeeded" else f"FAILED: {message}"


def said(pod):
    """(before, after, message) of a pod's termination message, whose first line is "<before> -> <after>"."""
    text = container(pod, "migrate").get("terminated", {}).get("message", "")
    found = re.match(r"(.*) -> (.*)\n?", text)
    lines = text[found.end() if found else 0 :].strip().splitlines()
    message = re.sub("^FAILED: ", "", "".join(char for char in (lines or [""])[-1] if char.isprintable()))
    return (found[1], found[2], reason(pod, message)) if found else ("", "", reason(pod, message))


def seconds(pod):
    state = container(pod, "migrate").get("terminated") if pod else None
    if not state:
        return ""
    started, finished = (
        calendar.timegm(time.strptime(state[at], "%Y-%m-%dT%H:%M:%SZ")) for at in ("startedAt", "finishedAt")
    )
    return str(finished - started)


def newest(of):
    """The newest pod of each index."""
    found = {}
    for pod in sorted(pods(of), key=lambda pod: pod["metadata"]["creationTimestamp"]):
        found[index_of(pod)] = pod
    return found


def report():
    succeeded, failed = status()
    pod_of = newest(job)
    # The targets before this Job's are its canaries, which succeeded: it would not have started.
    canaries = newest(f"{job}-canary") if first else {}
    rows = [row(targets[at][0], canaries.get(at), True) for at in range(first)]
    rows += [row(targets[first + at][0], pod_of.get(at), at in succeeded, at in failed) for at in range(count)]
    if failed:  # else their Job starts next
        rows += [row(target[0], None) for target in targets[first + count :]]
    rows.sort(key=lambda of: (of[4].startswith("FAILED"), of[4] == "not started"))
    table = [("target", "before", "after", "seconds", "result"), *rows]
    widths = [max(len(line[at]) for line in table) for at in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]) for line in table]
    results = collections.Counter(result.partition(":")[0].lower() for *_, result in rows)
    of = "" if len(rows) == len(targets) else f" of {len(targets)}"
    lines.append(f"{len(rows)}{of} targets: {', '.join(f'{number} {result}' for result, number in results.items())}")
    names = [name for name, *_, result in rows if result.startswith("FAILED")]
    if names:
        only = f"--set 'rollout.only={{{','.join(names)}}}'"
        lines.append(
            f"FAILED: {len(names)} of {len(rows)} targets; fix them and upgrade again, or only these: {only} {SEE}"
        )
    is_complete = (succeeded | failed).issuperset(range(count))
    finish("\n".join([*lines, ""]), 0 if is_complete else STOPPED)


if index == count or (max_failures < sys.maxsize and len(status()[1]) > max_failures):
    wait_and_report()
name, schema, port, config_map, secret = targets[first + index]
lines = [f"TARGET={shlex.quote(name)} NUMBER='{first + index + 1} of {len(targets)}'"]
lines += [f"HOSTNAME={me}"]  # that of an Indexed Job's pod is not its name
lines += [f"export DB_SCHEMA={shlex.quote(schema)}"] if schema else []
lines += [f"export DB_PORT={port}"] if port else []
sources = []
for kind, reference, *variables in (
    ("ConfigMap", config_map, "DB_HOST", "DB_NAME"),
    ("Secret", secret, "DB_USER", "DB_PASSWORD"),
):
    for key, variable in zip(reference[1:], variables):
        if key:
            # If its own is missing, that of "db" would be another database's.
            lines.append(f"unset {variable}")
            sources.append(f'{variable} key "{key}" of {kind} "{reference[0]}"')
write("target", "\n".join([*lines, "SOURCES=" + shlex.quote("\n".join(sources)), ""]))
