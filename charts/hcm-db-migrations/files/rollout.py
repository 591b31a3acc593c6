# The init container "rollout" of a pod of several targets (an Indexed Job). It is the only one with access to the
# Kubernetes API, and decides what the pod does, by files in the pod's volume, the working directory:
# - ./target: its index's target, as a shell script for migrate.sh.
# - ./report and ./report-status: what it prints instead, and its exit code. It reports if it has the last index, or if
#   more than MAX_FAILURES targets have failed; then the Job ends, and no other target is started.
# /etc/targets/list has [name, schema, port, [ConfigMap, its keys], [Secret, its keys]] of each. This JOB's are COUNT,
# from FIRST on; its canaries are before, if any. SECONDS is the pod's deadline. MAX_FAILURES may be empty: no limit.
import calendar
import collections
import http.client
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
from pathlib import Path

NOT_RETRYABLE, CONTINUES, STOPS = 255, 253, 254  # exit codes, in the Job's podFailurePolicy
SEE = '(README.md of the chart, "Many databases")'
NAMESPACE, JOB, POD, MAX_FAILURES = (os.environ[name] for name in ("NAMESPACE", "JOB", "POD", "MAX_FAILURES"))
FIRST, COUNT, INDEX = (int(os.environ[name]) for name in ("FIRST", "COUNT", "JOB_COMPLETION_INDEX"))
LATEST = time.monotonic() + int(os.environ["SECONDS"]) * 0.6  # before the deadline, which would delete the log
TARGETS = json.loads(Path("/etc/targets/list").read_text())
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # as PID 1, it would ignore the signal


def finish(report, status):
    Path("report-status").write_text(str(status))
    Path("report").write_text(report + "\n")
    sys.exit()


def api(path, **query):
    """An object of the API, or {} if it cannot be reached and need not be. Retried: the Role may be seconds old."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}/{path}?{urllib.parse.urlencode(query)}"
    latest = min(time.monotonic() + 30, LATEST)
    while True:
        try:
            context = ssl.create_default_context(cafile="/etc/api/ca.crt")
            # Python 3.13 and newer would refuse the CAs of many clusters.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            https = urllib.request.HTTPSHandler(context=context)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
            token = Path("/etc/api/token").read_text()
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
            with opener.open(request, timeout=10) as response:
                return json.load(response)
        except (OSError, ValueError, http.client.HTTPException) as error:
            print(f"the Kubernetes API: {error}", flush=True)
            needs_answer = MAX_FAILURES or INDEX == COUNT or isinstance(error, urllib.error.HTTPError)
            if not needs_answer:
                return {}
            if time.monotonic() > latest:
                refuse(error)
            time.sleep(1)


def refuse(error):
    if getattr(error, "code", None) in (401, 403):
        cause = f"the ServiceAccount has no access to the state of the Job and its pods ({error})"
        finish(f"FAILED: {cause}: let it get jobs and list pods in the namespace {SEE}", NOT_RETRYABLE)
    cause = f"the Kubernetes API, which has the state of the Job and its pods, cannot be reached ({error})"
    if INDEX == COUNT and not MAX_FAILURES:
        finish(f"no report: {cause}", 0)
    finish(f"FAILED: {cause}: allow the connection {SEE}", 1)


def pods(label, **query):
    """The pods with a label, without their specs: a thousand would not fit into the memory."""
    query = {**query, "labelSelector": f"batch.kubernetes.io/{label}", "limit": 50}
    while True:
        page = api(f"api/v1/namespaces/{NAMESPACE}/pods", **query)
        for pod in page["items"]:
            metadata = pod["metadata"]
            index = metadata.get("annotations", {}).get("batch.kubernetes.io/job-completion-index")
            if index is not None:
                of = {"name": metadata["name"], "index": int(index), "created": metadata["creationTimestamp"]}
                yield {**of, "status": pod["status"]}
        query["continue"] = page["metadata"].get("continue")
        if not query["continue"]:
            return


def states(pod):
    """{container: {"waiting" | "running" | "terminated": {...}}}."""
    status = pod["status"]
    found = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return {each["name"]: each["state"] for each in found}


def indexes(text):
    """The indexes of "1,3-5"."""
    ranges = [part.split("-") for part in (text or "").split(",") if part]
    return {index for part in ranges for index in range(int(part[0]), int(part[-1]) + 1)}


def job():
    """The targets' indexes that succeeded and that failed (in Kubernetes 1.28, always none), and the pods' label."""
    found = api(f"apis/batch/v1/namespaces/{NAMESPACE}/jobs/{JOB}")
    succeeded, failed = (indexes(found.get("status", {}).get(at)) for at in ("completedIndexes", "failedIndexes"))
    return succeeded - {COUNT}, failed - {COUNT}, f"controller-uid={found.get('metadata', {}).get('uid')}"


def stops(failed):
    return MAX_FAILURES != "" and len(failed) > int(MAX_FAILURES)


def is_time_to_report():
    """All targets are done; or, if the rollout stops, none runs, and this pod is the first of those that wait here."""
    succeeded, failed, label = job()
    if not stops(failed):
        return (succeeded | failed).issuperset(range(COUNT))
    time.sleep(5)  # until the API knows of the pods before that failure whether their target has started
    active = pods(label, fieldSelector="status.phase!=Succeeded,status.phase!=Failed")
    others = [(pod["index"], states(pod).get("rollout", {})) for pod in active if pod["name"] != POD]
    return not any("terminated" in state or ("running" in state and index < INDEX) for index, state in others)


def stuck(state):
    """Why a container does not run, or failed; or ''."""
    reason = state.get("waiting", {}).get("reason", "").replace("PodInitializing", "")
    code = state.get("terminated", {}).get("exitCode")
    return reason or (f"exit code {code}" if code else "")


def said(pod):
    """(before, after, reason) of a pod's termination message: `position: <before> -> <after>`, and why it failed."""
    found = states(pod)
    ended = found.get("migrate", {}).get("terminated", {})
    message = ended.get("message", "")
    position = re.match(r"position: (.*) -> (.*)\n", message)
    lines = message[position.end() if position else 0 :].strip().splitlines()[-1:]
    if not (position and lines):  # killed, or never started: kubelet takes the end of the log for the message
        causes = [pod["status"].get("reason"), ended.get("reason")]
        causes += [f"{name}: {cause}" for name, state in found.items() if (cause := stuck(state))]
        lines = [", ".join(filter(None, [*causes, *lines])) or "unknown"]
    reason = "".join(char for char in lines[0] if char.isprintable())
    return *(position.groups() if position else ("", "")), reason.removeprefix("FAILED: ")


def seconds(pod):
    ended = states(pod).get("migrate", {}).get("terminated", {})
    times = [ended[at] for at in ("startedAt", "finishedAt") if ended.get(at)]
    parsed = [calendar.timegm(time.strptime(at, "%Y-%m-%dT%H:%M:%SZ")) for at in times]
    return str(parsed[1] - parsed[0]) if len(parsed) == 2 else ""


def row(target, attempts, has_succeeded=False, has_failed=False):
    """(name, before, after, seconds, result) by the pods that ended, which know before their Job; or by the Job."""
    ended = [pod for pod in attempts if pod["status"]["phase"] in ("Succeeded", "Failed") and not has_reported(pod)]
    last = ended[-1] if ended else None
    phase = last["status"]["phase"] if last else "Succeeded" if has_succeeded else "Failed" if has_failed else ""
    if not phase:
        return target[0], "", "", "", "not started"
    _, after, reason = said(last) if last else ("", "", "its pod was deleted")
    before = next(filter(None, (said(pod)[0] for pod in ended)), "")
    result = "done" if not before else "unchanged" if before == after else "migrated"
    took = seconds(last) if last else ""
    return target[0], before, after, took, result if phase == "Succeeded" else f"FAILED: {reason}"


def has_reported(pod):
    """Whether a pod reported, or would have, instead of starting its target."""
    return states(pod).get("migrate", {}).get("terminated", {}).get("exitCode") in (CONTINUES, STOPS)


def attempts(label):
    """The pods of each index, oldest first."""
    found = collections.defaultdict(list)
    for pod in sorted(pods(label), key=lambda pod: pod["created"]):
        found[pod["index"]].append(pod)
    return found


def report():
    succeeded, failed, label = job()
    rows = []
    if FIRST:  # the canaries have succeeded, or this Job would not have started
        canaries = attempts(f"job-name={JOB}-canary")
        rows += [row(target, canaries[at], has_succeeded=True) for at, target in enumerate(TARGETS[:FIRST])]
    own = attempts(label)
    for at, target in enumerate(TARGETS[FIRST : FIRST + COUNT]):
        rows.append(row(target, own[at], at in succeeded, at in failed))
    if failed:  # else the canaries' Job is followed by that of the others
        rows += [row(target, []) for target in TARGETS[FIRST + COUNT :]]
    rows.sort(key=lambda of: (of[4].startswith("FAILED"), of[4] == "not started"))
    table = [("target", "before", "after", "seconds", "result"), *rows]
    widths = [max(len(line[at]) for line in table) for at in range(4)]
    lines = ["  ".join([*(line[at].ljust(widths[at]) for at in range(4)), line[4]]) for line in table]
    names = [of[0] for of in rows if of[4].startswith("FAILED")]
    others = collections.Counter(of[4] for of in rows if of[0] not in names)
    counts = ", ".join(f"{number} {result}" for result, number in others.items())
    of = f" of {len(TARGETS)}" if len(rows) < len(TARGETS) else ""
    total = f"{len(rows)}{of} {'targets' if len(TARGETS) > 1 else 'target'}"
    if names:
        only = f"--set-string 'hcm-db-migrations.rollout.only={{{','.join(names)}}}'"
        fix = f"fix them and upgrade all again, or these: {only}"
        lines.append(f"FAILED: {len(names)} of {total}{f' ({counts})' if counts else ''}; {fix} {SEE}")
    else:
        lines.append(f"DONE: {total}: {counts}")
    is_complete = (succeeded | failed).issuperset(range(COUNT))
    finish("\n".join(lines), 0 if is_complete else STOPS)


# Also without a limit: a Job that Helm did not wait for has no access any more, and must not run after the next one.
if INDEX == COUNT or stops(job()[1]):
    while not is_time_to_report():
        if time.monotonic() > LATEST:
            finish("other targets are still running: the report continues in another pod", CONTINUES)
        time.sleep(2)
    report()
name, schema, port, config_map, secret = TARGETS[FIRST + INDEX]
lines = [f"target={shlex.quote(name)} number='{FIRST + INDEX + 1} of {len(TARGETS)}'"]
lines.append(f"HOSTNAME={POD}")  # for messages; that of an Indexed Job's pod is not its name
lines += [f"export DB_SCHEMA={shlex.quote(schema)}"] if schema else []
lines += [f"export DB_PORT={port}"] if port else []
sources = []
references = [("ConfigMap", config_map, ("DB_HOST", "DB_NAME")), ("Secret", secret, ("DB_USER", "DB_PASSWORD"))]
for kind, reference, variables in references:
    for at, key in enumerate(reference[1:]):
        if key:
            lines.append(f"unset {variables[at]}")  # if it is missing, that of "db" would be another database's
            sources.append(f'{variables[at]} key "{key}" of {kind} "{reference[0]}"')
lines.append("sources=" + shlex.quote("\n".join(sources)))
Path("target").write_text("\n".join([*lines, ""]))
