"""The Compose files: by the specification's parser, by our own programs', and against one another."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compose_spec import PyCompose
from conftest import TASKS
from jina_v4_merge.files import json_bytes
from jina_v4_merge.writing.checkpoint import MANIFEST_NAME, STANDIN_KEY
from jina_v4_serve.gateway.run import GatewaySettings, parse_servers
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.supervisor import Policy
from jina_v4_serve.settings import read_settings

Manifest = dict[str, Any]
FILES = {
    "gpu": ("compose.yaml",),
    "cpu": ("compose.yaml", "compose.cpu.yaml"),
    "folder": ("compose.yaml", "compose.folder.yaml"),
}


@pytest.fixture(params=FILES)
def project(request: pytest.FixtureRequest, compose: Callable[..., Manifest]) -> Manifest:
    return compose(*FILES[request.param], BASE="/models/v4")


def seconds(text: str) -> float:
    return sum(float(number) * {"s": 1, "m": 60}[unit] for number, unit in re.findall(r"(\d+)(s|m)", text))


def with_gateway() -> tuple[str, ...]:
    return (*TASKS, "gateway")


def test_the_parser_of_the_compose_specification_accepts_the_file(project: Manifest) -> None:
    PyCompose.from_json(json.dumps(project)).validate()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stop_grace": "9s"}, "stop_grace"),
        ({"depends_on": {"retrieval": {"condition": "service_well"}}}, "service_well"),
        ({"stop_grace_period": "nine"}, "nine"),
    ],
    ids=["an unknown key", "an unknown condition", "no duration"],
)
def test_the_parser_of_the_compose_specification_sees_mistakes(
    compose: Callable[..., Manifest], change: Manifest, complaint: str
) -> None:
    project = compose("compose.yaml")
    project["services"]["code"] |= change
    with pytest.raises(ValueError, match=complaint):
        PyCompose.from_json(json.dumps(project))


def test_volumes_secrets_and_services_are_exactly_those_that_are_used(project: Manifest) -> None:
    services = project["services"].values()
    named = [volume for service in services for volume in service.get("volumes", ()) if isinstance(volume, str)]
    assert {volume.split(":")[0] for volume in named} == set(project["volumes"])
    assert {secret for service in services for secret in service.get("secrets", ())} == set(project["secrets"])
    assert {name for service in services for name in service.get("depends_on", ())} < set(project["services"])


def test_each_server_serves_its_task_from_the_volume_that_the_merge_writes(project: Manifest, read_command) -> None:
    for task in TASKS:
        service = project["services"][task]
        command = read_command(service["command"])
        assert command.command == task
        assert command.options["host"] == "0.0.0.0"  # noqa: S104 - inside the container
        assert str(command.options["checkpoint"]) == f"/models/jina-embeddings-v4-{task}"
        assert "models:/models:ro" in service["volumes"]
        assert service["environment"]["JINA_V4_API_KEY_FILE"] == "/run/secrets/api-key"
        assert f"cache-{task}:/cache" in service["volumes"], "compiled code is nobody else's"
    assert "models:/models" in project["services"]["merge"]["volumes"]


def test_the_gateway_finds_the_servers(project: Manifest, read_command) -> None:
    gateway = project["services"]["gateway"]
    command = read_command(gateway["command"])
    ports = {task: read_command(project["services"][task]["command"]).options["port"] for task in TASKS}
    assert parse_servers(command.options["server"]) == {task: f"http://{task}:{ports[task]}" for task in TASKS}
    (published,) = gateway["ports"]
    assert published == f"127.0.0.1:8000:{command.options['port']}"
    assert not any("ports" in project["services"][task] for task in TASKS)


def test_health_checks_ask_the_ports_that_are_listened_on_and_no_proxy(
    project: Manifest, read_command, exit_code_of_health_check: Callable[[str, int], int]
) -> None:
    for name in with_gateway():
        service = project["services"][name]
        port = read_command(service["command"]).options["port"]
        path = "health" if name == "gateway" else "ready"
        program = service["healthcheck"]["test"][-1]
        assert f"http://127.0.0.1:{port}/{path}'" in program
        assert [exit_code_of_health_check(program, status) for status in (200, 503)] == [0, 1]


def test_each_starts_when_the_one_before_it_is_ready(project: Manifest) -> None:
    order = ["merge", *TASKS, "gateway"]
    conditions = ["service_completed_successfully", *["service_healthy"] * 3]
    for before, name, condition in zip(order, order[1:], conditions, strict=False):
        assert project["services"][name]["depends_on"] == {before: {"condition": condition}}


def test_a_service_that_is_stopped_has_time_to_finish_its_requests(project: Manifest) -> None:
    for task in TASKS:
        assert seconds(project["services"][task]["stop_grace_period"]) > Policy().stop_s
    assert seconds(project["services"]["gateway"]["stop_grace_period"]) > GatewaySettings({}).drain_s + 5


def test_nothing_runs_as_root_or_writes_outside_its_volumes(project: Manifest) -> None:
    for service in project["services"].values():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        mounted = {volume.split(":")[1] for volume in service.get("volumes", ()) if isinstance(volume, str)}
        assert {"/tmp", "/cache"} <= mounted | {mount.split(":")[0] for mount in service["tmpfs"]}  # noqa: S108


def test_three_servers_share_one_gpu(compose: Callable[..., Manifest], read_command) -> None:
    services = compose("compose.yaml")["services"]
    for task in TASKS:
        assert read_command(services[task]["command"]).for_vllm == (), "each takes what it needs, and no more"
        assert services[task]["environment"]["JINA_V4_SERVERS_ON_MACHINE"] == str(len(TASKS))
        (device,) = services[task]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_file_for_cpus_asks_for_no_gpu(compose: Callable[..., Manifest], read_command) -> None:
    services = compose(*FILES["cpu"])["services"]
    assert {service["image"] for service in services.values()} == {"jina-v4:cpu"}
    assert {service["build"]["target"] for service in services.values()} == {"cpu"}
    assert not any("deploy" in service for service in services.values())
    for task in TASKS:
        assert read_command(services[task]["command"]).for_vllm == ()


def test_without_a_gpu_the_servers_share_all_cores(
    compose: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "n_cores", lambda: 32)
    for task in TASKS:
        environment = compose(*FILES["cpu"])["services"][task]["environment"]
        for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):  # by which an operator decides
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        assert cpu.threads(read_settings().servers_on_machine)["OMP_NUM_THREADS"] == "10"


def test_the_targets_are_the_containerfile_s(project: Manifest, stages, root: Path) -> None:
    for service in project["services"].values():
        assert service["build"]["target"] in stages
        assert service["image"] == f"jina-v4:{service['build']['target']}"
        context = (root / "deploy/containers" / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).is_file()


@pytest.fixture
def merge_missing(root: Path, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run the script that the image holds, with a program in the place of ours that says what it was asked."""
    programs, models = tmp_path / "bin", tmp_path / "models"
    programs.mkdir()
    models.mkdir()
    (programs / "jina-v4-merge").write_text('#!/bin/sh\necho "$@"\n')
    (programs / "jina-v4-merge").chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "MODELS": str(models), "TMPDIR": str(tmp_path)}
    script = root / "deploy/containers/merge-missing"
    return lambda base: subprocess.run([script, base], env=environment, capture_output=True, text=True)


def test_the_merge_takes_a_base_and_makes_what_is_missing(project: Manifest, merge_missing, tmp_path: Path) -> None:
    assert project["services"]["merge"]["entrypoint"] == ["merge-missing"]
    (base,) = project["services"]["merge"]["command"]
    models = tmp_path / "models"

    def run() -> list[str]:
        done = merge_missing(base)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    tasks = " ".join(f"--task {task}" for task in TASKS)
    canaries = [f"verify {models}/jina-embeddings-v4-{task} --canary" for task in TASKS]
    assert run() == [f"fold --base {base} --out {models} {tasks}", *canaries]
    (models / "jina-embeddings-v4-retrieval").mkdir()
    (models / "jina-embeddings-v4-retrieval/canary.json").touch()
    assert run() == [
        f"fold --base {base} --out {models} --task text-matching --task code",
        *[canary for canary in canaries if "retrieval" not in canary],
    ]
    for task in TASKS:
        (models / f"jina-embeddings-v4-{task}").mkdir(exist_ok=True)
        (models / f"jina-embeddings-v4-{task}/canary.json").touch()
    assert run() == []


def test_random_weights_of_an_earlier_try_are_not_taken_for_those_that_are_wanted(
    merge_missing, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "models/jina-embeddings-v4-code"
    checkpoint.mkdir()
    sources = {"base": {"name": "/tmp/standin-base", STANDIN_KEY: {"seed": 0}}}  # noqa: S108 - as the script names it
    (checkpoint / MANIFEST_NAME).write_bytes(json_bytes({"task": "code", "sources": sources}))
    refused = merge_missing("jinaai/jina-embeddings-v4")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"error: {checkpoint} has the random weights of BASE=standin" in refused.stderr
    assert merge_missing("standin").returncode == 0
    sources["base"] = {"name": "jinaai/standin"}
    (checkpoint / MANIFEST_NAME).write_bytes(json_bytes({"task": "code", "sources": sources}))
    assert merge_missing("jinaai/jina-embeddings-v4").returncode == 0
