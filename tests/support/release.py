"""Releases of the chart in the tests' cluster."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.chart import merged
from tests.support.programs import Program, Result, normalize, observed, start
from tools.cluster import Cluster
from tools.paths import CHART, ROOT


def readable(output: str) -> str:
    """Helm's output, piped through the sed command of the chart's README."""
    script = re.search(r"helm upgrade \.\.\. 2>&1 \| sed '(.*)'", (CHART / "README.md").read_text())
    assert script
    # It prints what Helm printed, but with an exit code that is not Helm's.
    result = start(["sed", script[1]], stdin=output, is_evidence=False).wait(verbatim=True)
    assert result.returncode == 0, result.text
    return result.stdout


@dataclass
class HelmProgram:
    """A started Helm process."""

    program: Program

    @property
    def output(self) -> str:
        """Unchanged."""
        return self.program.output

    def wait(self) -> Result:
        """Wait for the program to exit; the result has the readable output."""
        returncode, text = self.program.wait(240).returncode, readable(self.output)
        if self.program.is_evidence:
            observed.add(text, returncode)
        return Result(returncode, normalize(text))

    def kill(self) -> None:
        self.program.kill()


@dataclass
class Release:
    """A release of the chart in a namespace, with a Helm isolated from the user's settings."""

    helm: Path
    cluster: Cluster
    namespace: str
    home: Path
    values: dict[str, Any]
    name: str = "hcm-db-migrations"
    chart: Path = CHART
    upgrades: int = 0

    def start(self, *arguments: str | Path, is_evidence: bool = True) -> HelmProgram:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": self.cluster.kubeconfig}
        command = [self.helm, *arguments, "-n", self.namespace]
        return HelmProgram(start(command, cwd=ROOT, env=environment, one_stream=True, is_evidence=is_evidence))

    def run(self, *arguments: str | Path) -> Result:
        return self.start(*arguments).wait()

    def start_upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> HelmProgram:
        """Start `helm upgrade --install`, with `values` merged over the release's."""
        self.upgrades += 1
        file = self.home / f"{self.namespace}-{self.name}-{self.upgrades}.yaml"
        file.write_text(yaml.safe_dump(merged(self.values, values or {})))
        return self.start("upgrade", "--install", self.name, self.chart, "-f", file, *options)

    def upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> Result:
        return self.start_upgrade(values, *options).wait()

    def status(self) -> str:
        """Such as `deployed`."""
        result = self.start("status", self.name, "--output", "json").program.wait(240, verbatim=True)
        return str(json.loads(result.stdout)["info"]["status"])
