"""What `make bundle` cannot pack is one line, and no partial archive. (The archive: tests/e2e/test_bundle.py.)"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.support.documents import blocks
from tests.support.git import clone_checkout, git, nested_checkout
from tests.support.programs import run
from tools import bundle, cluster
from tools.cluster import ClusterKind, Provider
from tools.offline_cluster import engine
from tools.paths import ROOT
from tools.steps import UnavailableError

NEW = "charts/hcm-db-migrations/templates/new.yaml"
SHALLOW = "this checkout is shallow, and no server accepts a push of a partial history: git fetch --unshallow"
CHANGED = "not committed, so not in the bundle: {}; commit it, or git stash"


@pytest.mark.parametrize(
    ("options", "changed"),
    [(["--depth=1"], ""), ([], "requirements.txt"), ([], NEW)],
    ids=["shallow", "changed", "new in the chart"],
)
def test_a_checkout_that_is_not_what_would_be_deployed_is_refused(
    tmp_path: Path, options: list[str], changed: str
) -> None:
    clone = clone_checkout(tmp_path / "clone", *options)
    line = SHALLOW
    if changed:
        with (clone / changed).open("a") as file:
            file.write("# changed\n")
        line = CHANGED.format((clone / changed).relative_to(tmp_path / "clone"))
    result = run([sys.executable, "-m", "tools.bundle"], cwd=clone, env=os.environ)
    assert (result.returncode, result.text) == (1, f"FAILED: {line}\n")
    assert not (clone / "dist").exists()


def test_a_folder_of_a_repository_is_what_is_checked_and_what_the_page_deploys(tmp_path: Path) -> None:
    project = nested_checkout(tmp_path)
    for file in (tmp_path / "elsewhere", project / "requirements.txt"):
        with file.open("a") as changed:
            changed.write("# changed\n")
        git(tmp_path, "add", "--intent-to-add", file)
    result = run([sys.executable, "-m", "tools.bundle"], cwd=project, env=os.environ)
    assert result.text == f"FAILED: {CHANGED.format('utilities/hcm-db-migrations/requirements.txt')}\n"
    for path, link in (("", "code"), ("utilities/hcm-db-migrations", "code/utilities/hcm-db-migrations")):
        page = bundle._page("1.2.3", path)
        (values,) = [yaml.safe_load(each.text) for each in blocks(page) if 'requirements: "" #' in each.text]
        assert values["hcm-db-migrations"]["git"]["path"] == (path or ".")
        assert f"]({link}/charts/hcm-db-migrations/README.md" in page
        assert "<version>" not in page


def test_without_a_container_engine_the_line_has_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "locked", contextlib.nullcontext)  # the lock is held while the tests' cluster starts
    monkeypatch.setattr(engine, "running", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError) as caught, bundle._engine():
        pass
    assert str(caught.value).startswith(
        "cannot get the images: docker is not on PATH, and a private container engine requires root"
    )
    assert str(caught.value).endswith(". Start Docker with access to its registry")


def test_a_wheel_that_the_index_lacks_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Provider(ClusterKind.LOCAL_BUILD, {}, cluster.LOCAL_IMAGES, "")
    monkeypatch.setattr(bundle, "_check_checkout", lambda: None)
    monkeypatch.setattr(bundle, "_engine", lambda: contextlib.nullcontext(provider))
    monkeypatch.setattr(bundle, "python_version", lambda _: "3.99")
    monkeypatch.setattr(bundle, "MACHINES", ["x86_64"])
    monkeypatch.setattr(bundle, "DIST", tmp_path)
    with pytest.raises(SystemExit) as caught:
        bundle.main()
    message = str(caught.value)
    assert message.startswith("FAILED: no wheels of requirements.txt for Python 3.99 on x86_64: ")
    assert (" greenlet" in message, "has no usable wheels" in message, "\n" in message) == (True, True, False)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_writes_no_oci_layout_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.add(ROOT / "LICENSE", "manifest.json")
    with pytest.raises(UnavailableError, match=r"^docker save writes no OCI layout: Docker 25 or newer does$"):
        bundle._manifest(tmp_path / "image.tar")


def test_of_an_index_of_platforms_the_manifest_is_the_one_that_is_there(tmp_path: Path) -> None:
    """As Docker saves what it has pulled, with containerd's image store."""
    kinds = {
        "index": "application/vnd.oci.image.index.v1+json",
        "manifest": "application/vnd.oci.image.manifest.v1+json",
    }
    absent, present, index = (f"sha256:{letter * 64}" for letter in "abc")
    files = {
        "index.json": {"manifests": [{"mediaType": kinds["index"], "digest": index}]},
        f"blobs/sha256/{'c' * 64}": {
            "manifests": [{"mediaType": kinds["manifest"], "digest": digest} for digest in (absent, present)]
        },
        f"blobs/sha256/{'b' * 64}": {"layers": []},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        for name in files:
            archive.add(tmp_path / name, name)
    assert bundle._manifest(tmp_path / "image.tar") == present
