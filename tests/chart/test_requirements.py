"""What the Job installs from a repository: wheels only, hashes if there are any, and no file behind a symlink."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.documents import block
from tests.support.hostile_index import BACKEND, BUILD_SYSTEM, IN_TREE, HostileIndex, hostile_index
from tests.support.pod_scripts import CODE, COMMIT, CREDENTIALS, README, Volume, make_wheel, wheels_in
from tests.support.programs import Result, run
from tests.support.waiting import AT_ONCE
from tools.paths import ROOT

ALEMBIC = {
    "tool.py": "import sys\ndef main():\n    print('alembic of the venv:', sys.argv[1:], sys.prefix)\n",
    "alembic-0.0.1.dist-info/entry_points.txt": "[console_scripts]\nalembic = tool:main\n",
}
NOT_INSTALLED = (
    "FAILED: pip could not install requirements.txt (exit status 1, reason above): for a mirror, proxy or private "
    f'CA set "extraEnv" ({README}, "Requirements")'
)
ONLY_WHEELS = (
    "reason above): only wheels are installed; add the missing wheel to the index, or name the package in PIP_NO_BINARY"
    ' in "extraEnv": its code and its build dependencies\' then run with the credentials'
    f' ({README}, "Requirements")'
)
NO_HASHES = (
    "WARNING: requirements.txt has no hashes, so pip installs whatever the index serves: add them (uv pip compile or"
    ' pip-compile with --generate-hashes); PIP_REQUIRE_HASHES=1 in "extraEnv" refuses a file without them'
    f' ({README}, "Requirements")'
)


# It is Python that reads the file, whichever shell runs the script.
in_one_shell = pytest.mark.parametrize("shell", ["sh"])


def _wheel(folder: Path) -> str:
    """Create the package "alembic"; return its hash."""
    return hashlib.sha256(make_wheel(folder, "alembic", ALEMBIC).read_bytes()).hexdigest()


def installed(volume: Volume) -> str:
    """What the package "alembic" prints in the volume's venv."""
    return f"alembic of the venv: ['upgrade', 'head'] {volume.folder / 'venv'}\n"


@pytest.fixture
def index(volume: Volume) -> Iterator[HostileIndex]:
    with hostile_index(volume.folder / "index", volume.folder, "alembic", ALEMBIC) as found:
        page = volume.folder / "index" / "simple" / "needs-a-url"
        page.mkdir()
        needed = f"Requires-Dist: in_tree @ {found.in_tree}\n"
        wheel = make_wheel(volume.folder / "index", "needs_a_url", {}, needed)
        (page / "index.html").write_text(f'<a href="/{wheel.name}">{wheel.name}</a>')
        yield found


@pytest.fixture
def install(volume: Volume, container: Callable, shell: str) -> Callable[..., Result]:
    """Runs the migrate container for a checkout with this requirements file and these others."""

    def run_container(requirements: str, files: dict[str, str] | None = None, **variables: str) -> Result:
        folder = volume.clone("alembic.ini")
        for name, text in {"requirements.txt": requirements, **(files or {})}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return volume.run(container(requirements="requirements.txt"), shell, **CREDENTIALS, **variables)

    return run_container


def test_missing_requirements_are_named(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone("alembic.ini")
    assert volume.run(container(requirements="deploy.txt"), shell, **CREDENTIALS) == Result(
        255,
        CODE
        + f'FAILED: no deploy.txt in "utilities/hcm-db-migrations" of commit {COMMIT}: set "requirements" to its name, '
        f'or to "" if the image already contains the dependencies ({README}, "Requirements")\n',
    )


def test_requirements_are_installed_into_the_volume_by_their_hashes(install: Callable, volume: Volume) -> None:
    requirement = f"alembic==0.0.1 --hash=sha256:{_wheel(volume.folder)}\n"
    assert install(requirement, **wheels_in(volume.folder)) == Result(0, CODE + installed(volume))
    assert not list((volume.folder / "venv").rglob("__pycache__/tool*"))


def test_a_file_of_the_checkout_shadows_neither_python_nor_pip(install: Callable, volume: Volume) -> None:
    requirement = f"alembic==0.0.1 --hash=sha256:{_wheel(volume.folder)}\n"
    files = dict.fromkeys(("logging.py", "pip.py"), "raise SystemExit('not reached')\n")
    assert install(requirement, files, **wheels_in(volume.folder)) == Result(0, CODE + installed(volume))


@pytest.mark.fault(
    "Supply chain",
    fault="A requirement does not match its hash",
    sees="`THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE`, then `FAILED: pip could not install"
    " requirements.txt ...`, exit 1",
    state="Nothing installed; the database is not contacted",
    do="Find out who changed the package",
)
def test_a_tampered_requirement_stops_the_run_before_the_database(install: Callable, volume: Volume) -> None:
    _wheel(volume.folder)
    result = install(f"alembic==0.0.1 --hash=sha256:{'0' * 64}\n", **wheels_in(volume.folder))
    assert (result.returncode, result.text.startswith(CODE)) == (1, True)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE" in result.text
    assert result.lines[-1] == NOT_INSTALLED


@in_one_shell
@pytest.mark.parametrize(
    ("files", "path"),
    [
        ({"requirements.txt": "-r ../lib/base.txt"}, "../lib/base.txt"),
        ({"requirements.txt": "# -r ../x\nalembic\n  --requirement=../lib/base.txt  # why"}, "../lib/base.txt"),
        ({"requirements.txt": "-c../constraints.txt"}, "../constraints.txt"),
        ({"requirements.txt": "--constraint '../constraints.txt'"}, "../constraints.txt"),
        ({"requirements.txt": "-e ../lib[extra]"}, "../lib"),
        ({"requirements.txt": "--editable file:../lib#egg=lib"}, "../lib"),
        ({"requirements.txt": "./../lib"}, "../lib"),
        ({"requirements.txt": "-r pins/all.txt", "pins/all.txt": "-r ../../lib/base.txt"}, "../lib/base.txt"),
        ({"requirements.txt": "-r pins.txt"}, "pins.txt"),
        ({"requirements.txt": "--pre -r pins.txt"}, "pins.txt"),
        ({"requirements.txt": "-r /proc/self/environ"}, "/proc/self/environ"),
        ({"requirements.txt": "-r //proc/self/environ"}, "//proc/self/environ"),
        ({"requirements.txt": "-c file:///proc/self/environ"}, "/proc/self/environ"),
        ({"requirements.txt": "--pre -r inc.txt", "inc.txt": "--pre -r /proc/1/environ"}, "/proc/1/environ"),
    ],
)
def test_requirements_that_lead_out_of_the_checkout_are_named(
    install: Callable, files: dict[str, str], path: str
) -> None:
    lines = {name: f"{text}\n" for name, text in files.items()}
    result = install(lines.pop("requirements.txt"), lines, PIP_NO_INDEX="1")
    assert (result.returncode, result.lines[-1]) == (
        255,
        f'FAILED: requirements.txt refers to "{path}", which is not in the checkout: only "git.path" is, so add it to'
        f' "utilities/hcm-db-migrations" ({README}, "Requirements")',
    )


@in_one_shell
@pytest.mark.parametrize(
    "line",
    [
        "-r /absent.txt",
        '-r "my pins.txt"',
        "-r ${PINS}/x.txt",
        "-e ../there",
        "https://127.0.0.1:9/../a.whl",
        "absent==1",
    ],
)
def test_other_requirements_that_fail_do_not_lead_out_of_the_checkout(
    install: Callable, volume: Volume, line: str
) -> None:
    """git-sync checks out the files of the folders above git.path, too."""
    (volume.checkout.parent / "there").mkdir(parents=True)
    result = install(f"{line}\n", PIP_NO_INDEX="1")
    assert (result.returncode, result.lines[-1][:61]) == (
        1,
        "FAILED: pip could not install requirements.txt (exit status 1",
    )


@pytest.mark.fault(
    "Network",
    fault="The package index is unreachable",
    sees="`FAILED: pip could not install requirements.txt ...` within seconds, exit 1",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
def test_an_unreachable_index_is_reported_within_seconds(install: Callable) -> None:
    start = time.monotonic()
    result = install("alembic==0.0.1\n", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert (result.returncode, result.lines[-1]) == (1, NOT_INSTALLED)
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.fault(
    "Supply chain",
    fault="The index withholds a wheel, and serves the genuine source with its own build tools",
    sees="`FAILED: pip could not install requirements.txt ...: only wheels are installed; ...`, exit 1",
    state="Nothing installed, no code of the index has run; the database is not contacted",
    do="Add the wheel for the image's Python to the index, or see"
    " [Requirements](../charts/hcm-db-migrations/README.md#requirements); deploy again",
)
def test_an_index_without_the_wheel_runs_no_code(install: Callable, index: HostileIndex) -> None:
    result = install(f"{index.requirement}\n", PIP_INDEX_URL=index.url)
    assert (result.returncode, index.ran) == (1, False), result.text
    assert result.lines[-1].endswith(ONLY_WHEELS)
    result.line("ERROR: No matching distribution found for alembic==0.0.1")


@in_one_shell
@pytest.mark.parametrize(
    "requirements",
    [
        "--no-binary alembic\n{requirement}\n",
        "--no-binary :all:\n{requirement}\n",
        "--only-binary :none:\n{requirement}\n",
        "alembic @ {source}\n",
        "./package\n",
        "-e ./package\n",
        "in_tree @ {in_tree}\n",
        "{in_tree}\n",
        "--no-binary in_tree\nin_tree==0.0.1\n",
        "setup_py @ {setup_py}\n",
        "{setup_py}\n",
        "--no-binary setup_py\nsetup_py==0.0.1\n",
        "./building_itself\n",
        "-e ./building_itself\n",
        "needs_a_url==0.0.1\n",
    ],
)
def test_a_requirements_file_that_demands_a_build_runs_no_code_of_the_index(
    install: Callable, index: HostileIndex, requirements: str
) -> None:
    text = requirements.format(**vars(index))
    packages = {"package/pyproject.toml": BUILD_SYSTEM, "building_itself/pyproject.toml": IN_TREE}
    packages["building_itself/backend.py"] = BACKEND
    result = install(text, packages, PIP_INDEX_URL=index.url)
    assert (result.returncode, index.ran) == (1, False), result.text
    assert result.lines[-1].endswith(ONLY_WHEELS)


def test_a_package_that_is_named_is_built(install: Callable, index: HostileIndex, volume: Volume) -> None:
    (entry,) = yaml.safe_load(block("PIP_NO_BINARY"))["extraEnv"]
    named = {entry["name"]: entry["value"].replace("one-package", "alembic")}
    result = install(f"{index.requirement}\n", PIP_INDEX_URL=index.url, **named)
    assert (result, index.ran) == (Result(0, CODE + installed(volume)), True)


def test_a_file_that_allows_only_wheels_takes_precedence(install: Callable, index: HostileIndex) -> None:
    text = f"--only-binary :all:\n{index.requirement}\n"
    result = install(text, PIP_INDEX_URL=index.url, PIP_NO_BINARY="alembic")
    assert (result.returncode, index.ran) == (1, False), result.text


def test_a_requirements_file_may_have_any_name(volume: Volume, container: Callable, index: HostileIndex) -> None:
    folder = volume.clone("alembic.ini")
    make_wheel(volume.folder, "alembic", ALEMBIC)
    (folder / "requirements-setuptools.txt").write_text("alembic==0.0.1\n")
    of = container(requirements="requirements-setuptools.txt")
    result = volume.run(of, **CREDENTIALS, **wheels_in(volume.folder))
    assert (result.returncode, result.lines[-1] + "\n") == (0, installed(volume)), result.text


@in_one_shell
@pytest.mark.parametrize("empty", [":none:", " ", ",", ""])
def test_no_name_at_all_builds_nothing(install: Callable, index: HostileIndex, empty: str) -> None:
    result = install("./package\n", {"package/pyproject.toml": IN_TREE}, PIP_INDEX_URL=index.url, PIP_NO_BINARY=empty)
    assert (result.returncode, index.ran) == (1, False), result.text
    assert result.lines[-1].endswith(ONLY_WHEELS)


@pytest.mark.parametrize("variables", [{"PIP_NO_BINARY": "other"}, {"PIP_ONLY_BINARY": ":none:"}])
def test_a_package_that_is_not_named_is_not_built(install: Callable, index: HostileIndex, variables: dict) -> None:
    result = install(f"{index.requirement}\n", PIP_INDEX_URL=index.url, **variables)
    assert (result.returncode, index.ran) == (1, False), result.text
    assert result.lines[-1].endswith(ONLY_WHEELS)


def test_the_command_of_the_readme_runs_no_code_of_the_index(index: HostileIndex, tmp_path: Path) -> None:
    """With the options of requirements.txt, and a package of the test instead of the real ones."""
    options = re.findall(r"^-.*", (ROOT / "requirements.txt").read_text(), re.M)
    (tmp_path / "requirements.txt").write_text("\n".join([*options, index.requirement, ""]))
    text = block("python3 -m venv venv")
    commands = text[: text.index("cp .env.example")].replace("python3", sys.executable)
    assert "\npip install -r requirements.txt\n" in commands
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_INDEX_URL": index.url}
    result = run(["bash", "-ec", commands], cwd=tmp_path, env=environment)
    assert (result.returncode, index.ran) == (1, False), result.text
    result.line("ERROR: No matching distribution found for alembic==0.0.1")


@pytest.mark.fault(
    "Supply chain",
    fault="The requirements have no hashes",
    sees="`WARNING: requirements.txt has no hashes, so pip installs whatever the index serves: ...`",
    state="Complete, with what the index served",
    do="Add hashes; `PIP_REQUIRE_HASHES=1` in `extraEnv` refuses a file without them",
)
@in_one_shell
@pytest.mark.parametrize(
    "text",
    [
        "alembic==0.0.1\n",
        "alembic==0.0.1 # --hash=sha256:{digest}\n",
        "# uv pip compile --generate-hashes --hash=sha256:{digest}\nalembic==0.0.1\n",
        "# \\\nalembic==0.0.1\n",
        "alembic==0.0.1 # pinned \\\n    --hash=sha256:{digest}\n",
        "--hash=sha256:{digest}\nalembic==0.0.1\n",
        "-r more.txt\n",
        "-r folder/more.txt\n",
    ],
)
def test_requirements_without_hashes_are_reported(install: Callable, volume: Volume, text: str) -> None:
    digest = _wheel(volume.folder)
    others = {"more.txt": "alembic\n", "folder/more.txt": "-r ../more.txt\n"}
    result = install(text.format(digest=digest), others, **wheels_in(volume.folder))
    assert (result.returncode, result.lines[-1] + "\n") == (0, installed(volume)), result.text
    result.line(NO_HASHES)


@in_one_shell
@pytest.mark.parametrize(
    "text",
    [
        "alembic==0.0.1 --hash=sha256:{digest}\n",
        "alembic==0.0.1 \\\n    --hash=sha256:{digest} \\\n    --hash sha256:{digest}\n    # via nothing\n",
        "# pinned \\\nalembic==0.0.1 --hash=sha256:{digest}\n",
        "-r folder/more.txt\n",
        "-c folder/more.txt\nalembic\n",
        "--requirement=folder/more.txt # all\n",
    ],
)
def test_requirements_with_hashes_are_not_reported(install: Callable, volume: Volume, text: str) -> None:
    digest = _wheel(volume.folder)
    others = {
        "folder/more.txt": "-r last.txt\n",
        "folder/last.txt": f"alembic==0.0.1 --hash=sha256:{digest}\n",
    }
    assert install(text.format(digest=digest), others, **wheels_in(volume.folder)) == Result(
        0, CODE + installed(volume)
    )


def test_hashes_that_pip_is_to_ignore_are_reported(install: Callable) -> None:
    """An older pip does not know the option and refuses the file."""
    result = install(f"--no-require-hashes\nalembic==0.0.1 --hash=sha256:{'0' * 64}\n", PIP_NO_INDEX="1")
    assert result.returncode == 1
    result.line(NO_HASHES)


def test_requirements_without_hashes_are_refused_if_pip_demands_them(install: Callable, volume: Volume) -> None:
    """As the warning says."""
    _wheel(volume.folder)
    result = install("alembic==0.0.1\n", PIP_REQUIRE_HASHES="1", **wheels_in(volume.folder))
    assert result.returncode == 1
    result.line("Hashes are required in --require-hashes mode")


SYMLINK = "is a symlink, which is not followed: commit the file itself"


@pytest.mark.fault(
    "Code and settings",
    fault="The requirements file or `alembic.ini` is a symlink, for example to /proc/self/environ",
    sees="`FAILED: <file> in ... is a symlink, which is not followed: commit the file itself ...`, exit 255",
    state="The database is not contacted",
    do="Follow the message, deploy again",
)
@pytest.mark.parametrize("target", ["/proc/self/environ", "other.txt", "nowhere"])
@pytest.mark.parametrize(("name", "section"), [("alembic.ini", "Git access"), ("requirements.txt", "Requirements")])
def test_a_symlink_is_not_followed(
    volume: Volume, container: Callable, shell: str, name: str, section: str, target: str
) -> None:
    folder = volume.clone("alembic.ini", "requirements.txt", "other.txt")
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    assert volume.run(container(requirements="requirements.txt"), shell, **CREDENTIALS) == Result(
        255,
        f'{CODE}FAILED: {name} in "utilities/hcm-db-migrations" of commit {COMMIT} {SYMLINK} ({README}, "{section}")\n',
    )


def test_a_file_in_a_folder_that_leads_out_of_the_repository_is_not_read(
    volume: Volume, container: Callable, shell: str
) -> None:
    folder = volume.clone("alembic.ini")
    (volume.folder / "deploy.txt").write_text("s3cret")
    (folder / "sub").symlink_to(volume.folder)
    assert volume.run(container(requirements="sub/deploy.txt"), shell, **CREDENTIALS) == Result(
        255,
        f'{CODE}FAILED: sub/deploy.txt in "utilities/hcm-db-migrations" of commit {COMMIT} {SYMLINK}'
        f' ({README}, "Requirements")\n',
    )


def test_a_path_that_leads_out_of_the_repository_is_named(volume: Volume, container: Callable, shell: str) -> None:
    volume.clone().rmdir()
    (volume.folder / "alembic.ini").touch()
    volume.checkout.symlink_to(volume.folder)
    assert volume.run(container(), shell, **CREDENTIALS) == Result(
        255,
        f'{CODE}FAILED: folder "utilities/hcm-db-migrations" of commit {COMMIT} leads out of the repository through a'
        f' symlink: commit the folder itself ({README}, "Git access")\n',
    )


def test_a_mounted_configuration_may_be_a_symlink(volume: Volume, container: Callable, shell: str) -> None:
    """Kubernetes mounts the files of a ConfigMap as symlinks."""
    volume.clone()
    (volume.folder / "data.ini").touch()
    (volume.folder / "alembic.ini").symlink_to("data.ini")
    volume.program("alembic", "echo ran")
    extra = [{"name": "ALEMBIC_CONFIG", "value": str(volume.folder / "alembic.ini")}]
    assert volume.run(container(extraEnv=extra), shell, **CREDENTIALS) == Result(0, f"{CODE}ran\n")
