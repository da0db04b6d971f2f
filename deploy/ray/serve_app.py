"""jina-embeddings-v4 on Ray Serve: a deployment for each task and an ingress before them, on one /v1/embeddings.

    serve run --app-dir deploy/ray serve_app:app checkpoints=/models num_gpus=1 max_replicas=4

or, for a cluster, `serve deploy deploy/ray/config.yaml`. docs/ray.md has the rest.
"""

from jina_v4_serve.ray.ingress import Ingress
from jina_v4_serve.ray.replica import Replica
from jina_v4_serve.ray.settings import IngressSettings, RaySettings, ServerSettings
from ray import serve
from ray.serve import Application


def app(settings: RaySettings) -> Application:
    """Build the application; its deployments are named after the tasks."""
    scaling = {
        "min_replicas": settings.min_replicas,
        "max_replicas": max(settings.min_replicas, settings.max_replicas),
        "target_ongoing_requests": settings.target_ongoing_requests,
        "upscale_delay_s": settings.upscale_delay_s,
        "downscale_delay_s": settings.downscale_delay_s,
    }
    replica = serve.deployment(Replica).options(
        autoscaling_config=scaling,
        max_ongoing_requests=settings.max_ongoing_requests,
        # Past this, callers get 429 and Retry-After instead of a place in a queue.
        max_queued_requests=settings.max_ongoing_requests,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=1,
        max_surge_percent=settings.max_surge_percent,
        graceful_shutdown_timeout_s=settings.stop_s,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=4096,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.stop_s,
        ray_actor_options={"num_cpus": 0},
    )
    replicas = {task: replica.options(name=task).bind(settings.part(ServerSettings), task) for task in settings.tasks}
    return ingress.bind(settings.part(IngressSettings), replicas)
