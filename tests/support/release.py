"""Releases of the chart in the tests' cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.documents import block
from tests.support.programs import Program, Result, normalize, observed, start
from tools.binaries import find_or_build
from tools.cluster import NAME, Cluster
from tools.paths import CHART, ROOT
from tools.values import merged


def readable(output: str) -> str:
    """Helm's output, piped through the sed command of the chart's README."""
    script = re.search(r"helm upgrade \.\.\. 2>&1 \| sed '(.*)'", block("2>&1 | sed "))
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
        return self._start([self.helm, *arguments, "-n", self.namespace], is_evidence)

    def _start(
        self, command: list[str | Path], is_evidence: bool = True, stdin: str = "", cwd: Path = ROOT
    ) -> HelmProgram:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "KUBECONFIG": self.cluster.kubeconfig}
        program = start(command, cwd=cwd, env=environment, stdin=stdin, one_stream=True, is_evidence=is_evidence)
        return HelmProgram(program)

    def run(self, *arguments: str | Path) -> Result:
        return self.start(*arguments).wait()

    def start_upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> HelmProgram:
        """Start `helm upgrade --install`, with `values` merged over the release's."""
        file = self._file(merged(self.values, values or {}))
        return self.start("upgrade", "--install", self.name, self.chart, "-f", file, *options)

    def _file(self, values: dict[str, Any]) -> Path:
        self.upgrades += 1
        file = self.home / f"{self.namespace}-{self.name}-{self.upgrades}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def upgrade(self, values: dict[str, Any] | None = None, *options: str | Path) -> Result:
        return self.start_upgrade(values, *options).wait()

    def start_documented(self, command: str, cwd: Path = ROOT) -> HelmProgram:
        """Start a command of a README with this release's Helm, namespace (for `health`) and values (after its own)."""
        line, _, document = command.partition(" <<EOF\n")
        program, *arguments = shlex.split(line, comments=True)
        path = self.helm if program == "helm" else find_or_build(program)
        options: list[str | Path] = ["-f", self._file({NAME: self.values})] if arguments[0] == "upgrade" else []
        names = (self.namespace if argument == "health" else argument for argument in arguments)
        return self._start([path, *names, *options], stdin=document.removesuffix("EOF\n"), cwd=cwd)

    def documented(self, command: str, cwd: Path = ROOT) -> Result:
        return self.start_documented(command, cwd).wait()

    def example(self, block: str) -> dict[str, Any]:
        """The values of a README's block; this release's own variables are added to its `extraEnv`."""
        values: dict[str, Any] = yaml.safe_load(block)
        values = values.get(NAME, values)
        return {**values, "extraEnv": [*self.values.get("extraEnv", []), *values.get("extraEnv", [])]}

    def status(self) -> str:
        """Such as `deployed`."""
        result = self.start("status", self.name, "--output", "json").program.wait(240, verbatim=True)
        return str(json.loads(result.stdout)["info"]["status"])
