"""How long does the chart take to render, and where do the seconds of a `helm upgrade` without new revisions go?

The second needs a cluster: the running one of `make cluster`, or one that is created for it and deleted again.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.measure import Results, Sample, alternate, table, timed
from tools import cluster
from tools.binaries import find_or_build, source_folder
from tools.paths import CHART, ROOT
from tools.steps import UnavailableError, log, run

TEMPLATE = "`helm template`"
STAGES = (
    ("Helm renders, and the Job and its pod are created", "pod"),
    ("the pod is scheduled, its volumes mounted, git-sync started", "git-sync started"),
    ("git-sync clones", "git-sync finished"),
    ("the migrate container is started", "migrate started"),
    ("pip installs, Alembic starts", "pip finished"),
    ("Alembic migrates", "migrate finished"),
    ("the Job is complete, Helm deletes it and records the release", "end"),
)


def render(rounds: int) -> Results:
    """The samples of `helm template` by chart, each with the minimum values that it needs."""
    results = Results()
    helm = find_or_build("helm")
    with tempfile.TemporaryDirectory(prefix="hcm-bench-") as name:
        folder = Path(name)
        env = {"PATH": os.environ["PATH"], "HOME": name}
        run([helm, "create", "starter"], cwd=folder, env=env)
        (folder / "empty").mkdir()
        (folder / "empty/Chart.yaml").write_text("{apiVersion: v2, name: empty, version: 0.0.1}\n")
        (folder / "empty/values.yaml").write_text("")
        charts: dict[str, list[str | Path]] = {
            "ours": [CHART, "-f", ROOT / "environments/unified-dev.yaml"],
            "an empty chart": ["empty"],
            "`helm create`": ["starter"],
        }
        try:
            charts["Trivy's"] = [source_folder("trivy") / "helm/trivy"]
        except (RuntimeError, OSError) as error:
            results.failed["Trivy's", TEMPLATE] = f"not measured: {str(error).splitlines()[0]}"
        for number in range(rounds):
            for chart in alternate([*charts], number):
                command = [helm, "template", "release", *charts[chart]]
                results.samples[chart, TEMPLATE].append(timed(command, folder, env))
    return results


def upgrade(rounds: int) -> tuple[Results, str]:
    """The samples of a `helm upgrade` that finds nothing to do, by stage, and the version of Kubernetes.

    Raises UnavailableError without a cluster.
    """
    running = cluster.get_or_create(owner=os.getpid())
    try:
        _helm(running)
        results = Results()
        for number in range(rounds):
            times = _observe(running)
            before = times["start"]
            for stage, end in STAGES:
                results.samples["ours", stage].append(Sample(times[end] - before, 0))
                before = times[end]
            results.samples["ours", "total"].append(Sample(times["end"] - times["start"], 0))
            log(f"helm upgrade: round {number + 1} of {rounds}")
        return results, json.loads(running.kubectl("version", "--output=json"))["serverVersion"]["gitVersion"]
    finally:
        cluster.delete(os.getpid())  # unless another process owns it


def _helm(running: cluster.Cluster) -> None:
    """`helm upgrade --install`, as `make install` calls it."""
    values: list[str | Path] = ["-f", "environments/kind.yaml", "-f", cluster.STATE / "values.yaml"]
    command = [find_or_build("helm"), "upgrade", "--install", cluster.NAME, CHART, *values, "-n", "health"]
    run([*command, f"--kubeconfig={running.kubeconfig}"], cwd=ROOT)


class Watch:
    """What is seen of the next pod: the time (seconds since the epoch) of each change, and the log.

    A pod's own status has whole seconds only, so a time is that at which the change is reported.
    """

    def __init__(self, running: cluster.Cluster) -> None:
        self.kubectl = [str(find_or_build("kubectl")), f"--kubeconfig={running.kubeconfig}", "-n", "health"]
        self.times: dict[str, float] = {}
        self.log: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        options = ["--watch-only", "--output-watch-events", "--output=json"]
        self.events = subprocess.Popen([*self.kubectl, "get", "pods", *options], stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        time.sleep(2)  # until it watches
        return self

    def __exit__(self, *_: object) -> None:
        self.events.terminate()
        self.events.wait()
        self.reader.join()

    def _read(self) -> None:
        assert self.events.stdout
        for line in self.events.stdout:
            self._see(json.loads(line)["object"])

    def _see(self, pod: dict[str, Any]) -> None:
        now = time.time()
        self.times.setdefault("pod", now)
        for status in pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", []):
            name, state = status["name"], status["state"]
            if "waiting" in state:
                continue
            self.times.setdefault(f"{name} started", now)
            if name == "migrate" and not self.log:  # Helm deletes a Job that succeeded
                follow = [*self.kubectl, "logs", "-f", "--timestamps", "-c", name, pod["metadata"]["name"]]
                self.log = subprocess.Popen(follow, stdout=subprocess.PIPE, text=True)
            if "terminated" in state:
                self.times.setdefault(f"{name} finished", now)


def _observe(running: cluster.Cluster) -> dict[str, float]:
    """Upgrade once, and return the times of the ends of STAGES."""
    with Watch(running) as watch:
        watch.times["start"] = time.time()
        _helm(running)
        watch.times["end"] = time.time()
    assert watch.log
    lines = watch.log.communicate()[0].splitlines()
    # The line after that of the commit is Alembic's first.
    (code,) = [index for index, line in enumerate(lines) if " code: repository " in line]
    stamp = lines[code + 1].split()[0]
    watch.times["pip finished"] = datetime.datetime.fromisoformat(f"{stamp[:26].rstrip('Z')}+00:00").timestamp()
    return watch.times


def section(rounds: int) -> str:
    """Both tables; in place of the second, the reason if there can be no cluster."""
    results = render(rounds)
    charts = dict.fromkeys(chart for chart, _ in (*results.samples, *results.failed))
    rows = [[chart, results.cell(chart, TEMPLATE, "ours"), results.peak(chart)] for chart in charts]
    version = run([find_or_build("helm"), "version", "--short"]).partition("+")[0].strip()
    text = (
        f"{table([f'Chart, Helm {version}', TEMPLATE, 'peak'], rows)}\n{results.behind('ours', charts, [TEMPLATE])}\n"
    )
    try:
        results, version = upgrade(rounds)
    except UnavailableError as error:
        return f"{text}`helm upgrade` was not measured: {error}.\n"
    stages = [*(stage for stage, _ in STAGES), "total"]
    return text + table(
        [f"Stage of `helm upgrade`, Kubernetes {version}", "time"],
        [[s, results.cell("ours", s, "ours")] for s in stages],
    )
