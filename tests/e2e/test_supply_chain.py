"""A run uses only what was reviewed: images pinned by digest, packages by hash. (A moved git tag: test_git.py.)"""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.cluster import OWN_IMAGE, Shared
from tests.support.database import Database
from tests.support.kubernetes import FIRST_JOB, Api, node, open_gate, sessions, sessions_in_revision_002
from tests.support.pod_scripts import make_wheel
from tests.support.release import Release
from tests.support.repository import Repository
from tests.support.waiting import until
from tools.cluster import Cluster


@pytest.mark.fault(
    "Supply chain",
    fault="The tag of an image is moved",
    sees="No visible effect if the image is pinned by its digest",
    state="The reviewed image has run",
    do="Pin images by digest (`image.digest`, `git.image.digest`)",
)
def test_an_image_that_is_pinned_by_digest_is_the_one_that_runs(
    release: Release, api: Api, cluster: Cluster, audited_repository: Repository, database: Database
) -> None:
    """The tag points to another image. A node knows the digest of a pulled image, not of a loaded one."""
    ctr = ("ctr", "--namespace=k8s.io", "images")
    listed = node(cluster, *ctr, "list")
    name = f"docker.io/{':'.join(release.values['image'].values())}"
    digest = re.search(rf"^{re.escape(name)} .*?(sha256:[0-9a-f]{{64}})", listed, re.M)[1]
    node(cluster, *ctr, "tag", "--force", name, f"{name.rpartition(':')[0]}@{digest}")
    other = next(found for found in listed.split() if "pause:" in found)
    node(cluster, *ctr, "tag", "--force", other, f"{name.rpartition(':')[0]}:moved")
    upgrade = release.start_upgrade({"image": {"tag": "moved", "digest": digest}})
    until(lambda: sessions_in_revision_002(database))
    # The pod's status is updated late.
    pod = until(lambda: next((pod for pod in api.pods(FIRST_JOB) if pod.status.container_statuses[0].image_id), None))
    open_gate(database)
    assert upgrade.wait().returncode == 0
    assert pod.spec.containers[0].image.endswith(f":moved@{digest}")
    assert pod.status.container_statuses[0].image_id.endswith(digest)


@pytest.mark.fault(
    "Supply chain",
    fault="A package is replaced in the index",
    sees="`THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE`, then `FAILED: pip could not install"
    " requirements.txt ...`, exit 1",
    state="Nothing installed; the database is not contacted",
    do="Find out who changed the package",
)
def test_a_package_that_is_replaced_in_the_index_is_rejected(
    release: Release, api: Api, cluster: Cluster, repository: Repository, database: Database, with_pip: dict
) -> None:
    name = f"probe_{api.namespace.replace('-', '_')}"

    def publish(text: str) -> str:
        """Upload the package's only wheel to the index, replacing an earlier one; return its hash."""
        wheel = make_wheel(repository.folder.parent, name, {f"{name}.py": text})
        cluster.upload_wheel(wheel)
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    with (repository.folder / "requirements.txt").open("a") as requirements:
        requirements.write(f"{name}==0.0.1 --hash=sha256:{publish('reviewed = True')}\n")
    repository.push()
    assert release.upgrade(with_pip).returncode == 0
    before = sessions(cluster, database)
    publish("reviewed = False")
    refused = release.upgrade({**with_pip, "job": {"backoffLimit": 0}})
    assert refused.returncode == 1
    refused.line("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    refused.line("FAILED: pip could not install requirements.txt (exit status 1, reason above)")
    assert sessions(cluster, database) == before


def _uncompressed(archive: Path) -> bytes:
    """The contents of an image that docker has saved; the containerd store's layers are compressed."""
    with tarfile.open(archive) as members:
        files = [file.read() for member in members if (file := members.extractfile(member))]
    return b"".join(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data for data in files)


def test_an_image_that_was_built_with_a_private_index_does_not_contain_its_token(
    cluster: Cluster, shared: Shared, tmp_path: Path
) -> None:
    """The image of the Dockerfile, which the cluster's tests were built with: see Cluster.build_image."""
    if not shared.preinstalled_image:
        pytest.skip("builds an image, which requires a kind cluster of the tests: omit --kubeconfig")
    tag = f"{OWN_IMAGE['repository']}:{OWN_IMAGE['tag']}"
    history = cluster.docker("history", "--no-trunc", tag) + cluster.docker("image", "inspect", tag)
    assert "--require-hashes --only-binary :all:" in history
    archive = tmp_path / "image.tar"
    cluster.docker("save", f"--output={archive}", tag)
    layers = _uncompressed(archive)
    assert b"dist-packages/alembic/context.py" in layers or b"site-packages/alembic/context.py" in layers
    for secret in (cluster.passwords["TOKEN"], urlsplit(cluster.wheels_url).netloc):
        assert secret not in history
        assert secret.encode() not in layers
