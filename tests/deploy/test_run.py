"""A real server as an image would run it, on a machine that has no container engine.

Linux's own namespaces make the container: process 1 of its own, a user without a name and without rights, the
Containerfile's environment and nothing else, everything read-only but the volumes of the manifests. What is not seen
here is the image: the programs are those of this environment.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure, Golden
from servers import BIN, PATIENCE_S, Server, free_port

pytestmark = pytest.mark.long

UID = 10001
PLACE = "/srv"  # holds nothing on a machine like this; in the container's own view the volumes are mounted there
VOLUMES = ("cache", "tmp")
SHM_BYTES = 65536
# /root, where Python itself may be installed, is closed to others; in the container's own view it is open.
PROGRAM = f"""
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs {PLACE}
cd {PLACE}
mkdir cache tmp models upper work
cp -R "$CHECKPOINT" models
chmod -R a+rX,a-w models
chown {UID}:{UID} cache
chmod 0700 cache
chmod 1777 tmp
if [ -d /root ]; then mount -t overlay -o lowerdir=/root,upperdir={PLACE}/upper,workdir={PLACE}/work overlay /root; fi
for volume in cache tmp; do mount --bind $volume $volume; done
mount -t tmpfs -o mode=1777,size={SHM_BYTES} tmpfs /dev/shm
mount -o remount,bind,ro {PLACE}
if [ -d /root ]; then mount -o remount,ro /root; fi
mount -o remount,bind,ro /
cd {PLACE}/cache
exec setpriv --reuid {UID} --regid {UID} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i "$@"
"""
NEEDED = ("unshare", "setpriv", "mount", "chmod")


def namespaces() -> str | None:
    """Why a container cannot be made here; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root of a Linux machine may make namespaces and mounts"
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} is not on this machine"
    probe = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", PLACE]
    done = subprocess.run(probe, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces or no mounts: {done.stderr.strip()}"


@dataclass
class Container:
    """A server in namespaces of its own.

    Attributes:
        pid: of its process 1, as this machine counts.
    """

    server: Server
    pid: int

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self.pid}/root{inside}")

    def written(self, inside: str) -> list[str]:
        """The files below a folder of its own, sockets left out."""
        folder = self.path(inside)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def container(folded: Callable[[str], Path], stages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    if reason := namespaces():
        pytest.skip(reason)
    port = free_port()
    environment = stages["cpu"].environment() | {"PATH": f"{BIN}:/usr/bin:/bin"}
    variables = [f"{name}={re.sub('^/(?=cache|tmp)', f'{PLACE}/', value)}" for name, value in environment.items()]
    checkpoint = folded("float32") / "jina-embeddings-v4-retrieval"
    served = ["retrieval", f"--checkpoint={PLACE}/models/{checkpoint.name}", "--host=0.0.0.0", f"--port={port}"]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", PROGRAM, "sh"]
    log = tmp_path_factory.mktemp("container") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *variables, str(BIN / "jina-v4-serve"), *served],
            env=os.environ | {"CHECKPOINT": str(checkpoint)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", process, log)
        server.wait_ready()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Container(server, int(children[0]))
    finally:
        process.kill()  # --kill-child: everything in the namespace ends with it
        process.wait()


def status(container: Container) -> dict[str, str]:
    lines = Path(f"/proc/{container.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_server_runs_without_a_name_a_right_or_a_place_to_write(
    container: Container, golden: Golden, figure: Figure
) -> None:
    own = status(container)
    assert own["Uid"].split() == [str(UID)] * 4
    assert own["Groups"] == ""
    assert own["NSpid"].split()[-1] == "1"
    assert int(own["CapEff"], 16) == int(own["CapBnd"], 16) == 0
    assert own["NoNewPrivs"] == "1"
    mounts = [line.split() for line in Path(f"/proc/{container.pid}/mounts").read_text().splitlines()]
    options = {point: options.split(",") for _, point, _, options, *_ in mounts}
    assert all("ro" in options[point] for point in ("/", PLACE))
    assert all("rw" in options[f"{PLACE}/{volume}"] for volume in VOLUMES)

    with urllib.request.urlopen(f"{container.server.base_url}/ready", timeout=PATIENCE_S) as answer:  # noqa: S310 - http, on this machine
        assert answer.status == 200
    request = urllib.request.Request(  # noqa: S310 - our own address
        f"{container.server.base_url}/v1/embeddings",
        json.dumps({"input": golden.texts[0], "prompt_name": "query"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310 - http, on this machine
        (item,) = json.load(answer)["data"]
    difference = float(np.abs(np.array(item["embedding"]) - golden.rows["retrieval/query/0/dense"]).max())
    assert difference < 1e-5
    figure(f"as user {UID}, all read-only but /tmp and /cache: dense differs by {difference:.1e} from the reference")


def test_the_container_writes_only_to_its_volumes_and_not_to_shared_memory(
    container: Container, figure: Figure
) -> None:
    # Semaphores of 32 bytes, which some libraries make when they are imported, have their place there too.
    assert all(path.name.startswith("sem.") for path in container.path("/dev/shm").iterdir())  # noqa: S108
    assert "Traceback" not in container.server.log.read_text()
    assert "Read-only file system" not in container.server.log.read_text()
    assert "Permission denied" not in container.server.log.read_text()
    for volume in VOLUMES:
        files = container.written(f"{PLACE}/{volume}")
        figure(f"a server on a CPU leaves {len(files)} files in /{volume}: {', '.join(files[:5])}")


def test_the_container_ends_when_it_is_stopped(container: Container) -> None:
    os.kill(container.pid, signal.SIGTERM)
    assert container.server.process.wait(PATIENCE_S) == 0
