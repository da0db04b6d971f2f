"""`make dist`: three wheels and source archives that could be uploaded, and that work where nothing else is."""

import email
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from servers import BIN

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PROJECTS = ("client", "merge", "serve")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist") / "dist"
    command = ["make", "--no-print-directory", "dist", f"DIST={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2 * len(PROJECTS)
    return folder


@pytest.mark.parametrize("project", PROJECTS)
def test_a_wheel_says_all_that_an_index_shows(dist: Path, project: str) -> None:
    (wheel,) = dist.glob(f"jina_v4_{project}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        said = email.message_from_bytes(archive.read(metadata))
        (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Description-Content-Type"] == "text/markdown"
    assert f"# jina-v4-{project}\n" in said.get_payload()
    assert "Programming Language :: Python :: 3.13" in said.get_all("Classifier")
    extras = said.get_all("Provides-Extra")
    assert all(f"`{extra}`" in said.get_payload() for extra in extras), "its page describes every extra"


@pytest.mark.parametrize("project", PROJECTS)
def test_a_source_archive_has_readme_licence_and_tests_of_nobody(dist: Path, project: str) -> None:
    (archive,) = dist.glob(f"jina_v4_{project}-*.tar.gz")
    with tarfile.open(archive) as content:
        members = {member.name.partition("/")[2]: member for member in content.getmembers()}
    assert {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= members.keys()
    assert members["LICENSE"].isreg()
    assert {name.partition("/")[0] for name in members if "/" in name} == {"src"}


def test_the_commands_run_from_the_wheels_alone(dist: Path, tmp_path: Path) -> None:
    """Nothing of this repository is on the path. The merge's torch is the tests' own: it is two gigabytes."""
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "bare"], check=True)
    wheels = {project: next(dist.glob(f"jina_v4_{project}-*.whl")) for project in PROJECTS}
    install = [BIN / "uv", "pip", "install", "--quiet", "--python", tmp_path / "bare/bin/python"]
    install += ["-c", ROOT / "requirements/cpu.txt"]
    subprocess.run([*install, f"{wheels['client']}[embed]", wheels["serve"]], check=True)
    subprocess.run([*install, "--no-deps", wheels["merge"]], check=True)
    site = next((BIN.parent / "lib").glob("python*/site-packages"))
    for project in PROJECTS:
        scripts = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]["scripts"]
        for script in scripts:
            environment = {"PATH": os.environ["PATH"]} | ({"PYTHONPATH": str(site)} if project == "merge" else {})
            done = subprocess.run(
                [tmp_path / "bare/bin" / script, "--help"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert "Usage" in done.stdout
