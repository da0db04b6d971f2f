"""The manifests, rendered by kubectl without a cluster: against Kubernetes' schemas, our programs and one another."""

import base64
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import TASKS
from jina_v4_serve.api.door import OPEN
from jina_v4_serve.api.guard import ROUTES
from jina_v4_serve.gateway.run import GatewaySettings, parse_servers
from jina_v4_serve.launch.supervisor import Policy
from jina_v4_serve.settings import PREFIX, VARIABLES

Manifest = dict[str, Any]
KINDS = ("gpu", "cpu")
# The oldest and the newest that the schemas are there for; autoscaling/v2 and what else is used is in both.
VERSIONS = ("1.30", "1.37")
NOT_KUBERNETES = {"PodMonitor"}  # the Prometheus operator's


def of_kind(manifests: Iterable[Manifest], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def containers(manifests: Iterable[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """The pods' specifications, each with its one container."""
    for manifest in manifests:
        if "template" in manifest.get("spec", {}):
            pod = manifest["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield pod, container


def selected(manifests: Iterable[Manifest], labels: dict[str, str]) -> list[str]:
    """The names of what runs pods with these labels."""
    return [
        manifest["metadata"]["name"]
        for manifest in manifests
        if "template" in manifest.get("spec", {})
        and labels.items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
    ]


@pytest.fixture(params=KINDS)
def manifests(request: pytest.FixtureRequest, rendered: Callable[[str], list[Manifest]]) -> list[Manifest]:
    return rendered(request.param)


@pytest.fixture
def deployments(manifests: list[Manifest]) -> dict[str, Manifest]:
    return of_kind(manifests, "Deployment")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*KINDS, "merge", "autoscaling"])
def test_the_schemas_of_kubernetes_accept_the_files(
    rendered: Callable[[str], list[Manifest]], name: str, version: str
) -> None:
    found = rendered(name)
    assert found
    for manifest in found:
        if manifest["kind"] not in NOT_KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_of_kubernetes_see_mistakes(rendered: Callable[[str], list[Manifest]]) -> None:
    deployment = of_kind(rendered("gpu"), "Deployment")["jina-v4-code"]
    deployment["spec"]["template"]["spec"]["terminationGraceSeconds"] = 90
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_every_file_belongs_to_something(root: Path) -> None:
    """A manifest that no kustomization names would never be applied."""
    folder = root / "deploy/kubernetes"
    named = set()
    for path in folder.rglob("kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text())["resources"]:
            assert (path.parent / resource).exists(), f"{path}: {resource}"
            named.add((path.parent / resource).resolve())
    manifests = {path.resolve() for path in folder.rglob("*.yaml") if path.name != "kustomization.yaml"}
    values = {folder / "autoscaling/adapter-values.yaml", folder / "production-stack/values.yaml"}
    assert manifests - named == {path.resolve() for path in values}


def test_what_is_referred_to_exists(manifests: list[Manifest]) -> None:
    claims = of_kind(manifests, "PersistentVolumeClaim")
    assert {manifest["metadata"]["namespace"] for manifest in manifests if manifest["kind"] != "Namespace"} == {
        "jina-v4"
    }
    assert set(of_kind(manifests, "Namespace")) == {"jina-v4"}
    for pod, container in containers(manifests):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_selectors_and_labels_are_equal(manifests: list[Manifest], deployments: dict[str, Manifest]) -> None:
    assert set(deployments) == {*(f"jina-v4-{task}" for task in TASKS), "jina-v4-gateway"}
    for name, deployment in deployments.items():
        assert selected(manifests, deployment["spec"]["selector"]["matchLabels"]) == [name]
    for kind, get in (
        ("Service", lambda spec: spec["selector"]),
        ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
    ):
        found = of_kind(manifests, kind)
        assert found.keys() == deployments.keys()
        for name, manifest in found.items():
            assert selected(manifests, get(manifest["spec"])) == [name]


def test_each_server_serves_its_task(manifests: list[Manifest], deployments: dict[str, Manifest], read_command) -> None:
    for task in TASKS:
        (_, container) = next(containers([deployments[f"jina-v4-{task}"]]))
        command = read_command(container["args"])
        assert command.command == task
        assert str(command.options["checkpoint"]) == f"/models/jina-embeddings-v4-{task}"
        assert command.options["host"] == "0.0.0.0"  # noqa: S104 - inside the pod
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/models"]["readOnly"] is True


def test_ports_are_the_same_everywhere(
    manifests: list[Manifest], deployments: dict[str, Manifest], read_command
) -> None:
    services = of_kind(manifests, "Service")
    for name, deployment in deployments.items():
        (_, container) = next(containers([deployment]))
        (port,) = container["ports"]
        assert read_command(container["args"]).options["port"] == port["containerPort"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]
        (of_service,) = services[name]["spec"]["ports"]
        assert (of_service["port"], of_service["targetPort"]) == (port["containerPort"], port["name"])
    for policy in of_kind(manifests, "NetworkPolicy").values():
        ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert ports == {8000}


def test_the_gateway_finds_the_servers(
    manifests: list[Manifest], deployments: dict[str, Manifest], read_command
) -> None:
    (_, container) = next(containers([deployments["jina-v4-gateway"]]))
    services = of_kind(manifests, "Service")
    urls = {task: f"http://jina-v4-{task}:{services[f'jina-v4-{task}']['spec']['ports'][0]['port']}" for task in TASKS}
    assert parse_servers(read_command(container["args"]).options["server"]) == urls


def test_probes_ask_routes_that_need_no_key(deployments: dict[str, Manifest]) -> None:
    for name, deployment in deployments.items():
        (_, container) = next(containers([deployment]))
        paths = {
            probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        assert set(paths.values()) <= set(OPEN) & set(ROUTES)
        assert paths["livenessProbe"] == "/health"
        # The gateway's /ready says whether all tasks are there; one that is not must not take it off the Service.
        assert paths["readinessProbe"] == ("/health" if name == "jina-v4-gateway" else "/ready")


def test_a_pod_that_is_stopped_has_time_to_finish_its_requests(deployments: dict[str, Manifest]) -> None:
    for name, deployment in deployments.items():
        (pod, container) = next(containers([deployment]))
        program, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        own_s = GatewaySettings({}).drain_s + 5 if name == "jina-v4-gateway" else Policy().stop_s
        assert pod["terminationGracePeriodSeconds"] > int(pause_s) + own_s


def test_probes_give_a_server_that_is_restarted_in_its_pod_time(deployments: dict[str, Manifest]) -> None:
    for task in TASKS:
        (_, container) = next(containers([deployments[f"jina-v4-{task}"]]))
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 10 * Policy().unhealthy_s
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
        # /ready tries for 4 s to compute a vector before it says no.
        assert container["readinessProbe"]["timeoutSeconds"] > 4
        assert deployments[f"jina-v4-{task}"]["spec"]["progressDeadlineSeconds"] > 900


@pytest.mark.parametrize("name", [*KINDS, "merge"])
def test_pods_meet_the_restricted_standard(rendered: Callable[[str], list[Manifest]], name: str) -> None:
    (namespace,) = of_kind(rendered(name), "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod, container in containers(rendered(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "requests" in container["resources"]


def test_what_the_image_writes_to_is_mounted(rendered: Callable[[str], list[Manifest]], stages) -> None:
    folders = {value for value in stages["gpu"].environment().values() if value.startswith("/")}
    for name in (*KINDS, "merge"):
        for pod, container in containers(rendered(name)):
            if container["name"] == "gateway":
                continue  # it imports neither vLLM nor torch
            empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in empty}
            assert all(any(folder.startswith(mount) for mount in writable) for folder in folders)


def test_the_key_is_a_file(manifests: list[Manifest]) -> None:
    for pod, container in containers(manifests):
        (path,) = [each["value"] for each in container["env"] if each["name"] == "JINA_V4_API_KEY_FILE"]
        (mount,) = [each for each in container["volumeMounts"] if path.startswith(each["mountPath"] + "/")]
        (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
        assert volume["secret"]["items"] == [{"key": "api-key", "path": Path(path).name}]
        assert pod["securityContext"]["fsGroup"] > 0, "the group that may read it"


def test_every_variable_of_ours_is_one_that_is_read(manifests: list[Manifest]) -> None:
    names = {each["name"] for _, container in containers(manifests) for each in container["env"]}
    assert "JINA_V4_API_KEY_FILE" in names
    assert {name for name in names if name.startswith(PREFIX)} <= set(VARIABLES)


def test_a_gpu_is_asked_for_by_servers_alone(rendered: Callable[[str], list[Manifest]]) -> None:
    def asked(name: str) -> dict[str, object]:
        found = of_kind(rendered(name), "Deployment")
        limits = {key: next(containers([each]))[1]["resources"]["limits"] for key, each in found.items()}
        return {key: each["nvidia.com/gpu"] for key, each in limits.items() if "nvidia.com/gpu" in each}

    assert asked("gpu") == {f"jina-v4-{task}": 1 for task in TASKS}
    assert asked("cpu") == {}


@pytest.mark.parametrize("name", [*KINDS, "merge"])
def test_images_are_the_containerfile_s_targets(rendered: Callable[[str], list[Manifest]], stages, name: str) -> None:
    for _, container in containers(rendered(name)):
        repository, _, tag = container["image"].partition(":")
        assert repository == "jina-v4"
        assert tag in stages
        assert name == "merge" or tag == name


def test_the_merge_runs_the_image_s_script(rendered: Callable[[str], list[Manifest]], root: Path) -> None:
    ((pod, container),) = containers(rendered("merge"))
    assert (root / "deploy/containers" / container["command"][0]).is_file()
    (models,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/models"]
    assert not models.get("readOnly")
    claims = of_kind(rendered("merge"), "PersistentVolumeClaim")
    assert claims == of_kind(rendered("gpu"), "PersistentVolumeClaim"), "the servers' own"
    assert {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    } == set(claims)


def test_replicas_follow_a_metric_that_the_adapter_offers(
    rendered: Callable[[str], list[Manifest]], root: Path
) -> None:
    scalers = of_kind(rendered("autoscaling"), "HorizontalPodAutoscaler")
    deployments = of_kind(rendered("gpu"), "Deployment")
    assert set(scalers) == {f"jina-v4-{task}" for task in TASKS}
    values = yaml.safe_load((root / "deploy/kubernetes/autoscaling/adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    for name, scaler in scalers.items():
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert "replicas" not in deployments[name]["spec"], "`apply` would undo what the autoscaler did"
        (metric,) = scaler["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    (series,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert series == "vllm:num_requests_waiting"


def test_servers_and_gateway_are_scraped_and_nothing_is_counted_twice(
    rendered: Callable[[str], list[Manifest]], root: Path
) -> None:
    monitors = of_kind(rendered("autoscaling"), "PodMonitor")
    deployments = of_kind(rendered("gpu"), "Deployment").values()
    keep = yaml.safe_load((root / "deploy/monitoring/prometheus.yaml").read_text())["scrape_configs"][1]
    for name, n_selected, kept in (("jina-v4", len(TASKS), None), ("jina-v4-gateway", 1, keep)):
        spec = monitors.pop(name)["spec"]
        assert len(selected(deployments, spec["selector"]["matchLabels"])) == n_selected
        (endpoint,) = spec["podMetricsEndpoints"]
        assert endpoint["path"] in ROUTES
        relabelled = endpoint.get("metricRelabelings", [])
        assert [rule["regex"] for rule in relabelled] == [
            r["regex"] for r in (kept or {}).get("metric_relabel_configs", [])
        ]
    assert not monitors


def test_production_stack_s_router_is_told_of_our_services(
    rendered: Callable[[str], list[Manifest]], root: Path
) -> None:
    router = yaml.safe_load((root / "deploy/kubernetes/production-stack/values.yaml").read_text())["routerSpec"]
    services = of_kind(rendered("gpu"), "Service")
    backends = [f"http://jina-v4-{t}.jina-v4:{services[f'jina-v4-{t}']['spec']['ports'][0]['port']}" for t in TASKS]
    assert router["staticBackends"].split(",") == backends
    assert router["staticModels"].split(",") == [f"jina-embeddings-v4-{task}" for task in TASKS]


def test_the_secret_holds_the_key_without_the_end_of_its_line(rendered, root: Path, tmp_path: Path) -> None:
    """The Prometheus operator writes the secret into a header as it is; a newline in it ends every scrape."""
    (command,) = re.findall(r"^.*kubectl .* create secret .*$", (root / "docs/deploy.md").read_text(), re.MULTILINE)
    (tmp_path / "api-key").write_text("a-key\n")  # as openssl writes it
    shell = ["sh", "-c", f"{command} --dry-run=client --output=yaml"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
    secret = yaml.safe_load(done.stdout)
    assert base64.b64decode(secret["data"]["api-key"]) == b"a-key"
    for monitor in of_kind(rendered("autoscaling"), "PodMonitor").values():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": secret["metadata"]["name"], "key": "api-key"}
