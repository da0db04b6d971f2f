"""The settings of a deployment: the arguments of `serve run`, and `args` in a config file.

Replicas and ingress each get their part of the settings, Ray Serve the rest.
"""

import shlex
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Task = Literal["retrieval", "text-matching", "code"]
Part = TypeVar("Part", bound=BaseModel)


def _split(value: object) -> object:
    """Split a value from a command line, where a list is one string."""
    return shlex.split(value) if isinstance(value, str) else value


class ServerSettings(BaseModel):
    """Settings of a replica.

    Attributes:
        checkpoints: the folder that holds the merged checkpoints, on every node.
        num_gpus: per replica; less than 1 shares a GPU and its memory.
        num_cpus: per replica; without a GPU also the number of threads for computing.
        dtype: as for `jina-v4-serve`.
        max_pixels: as for `jina-v4-serve`.
        vllm_options: the options after the -- of `jina-v4-serve`.
        timeout_s: the longest time without a byte from a server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoints: Path
    num_gpus: Annotated[float, Field(ge=0)] = 0
    num_cpus: Annotated[float, Field(gt=0)] = 1
    dtype: str = "auto"
    max_pixels: int | None = None
    vllm_options: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    timeout_s: Annotated[float, Field(gt=0)] = 600


class IngressSettings(BaseModel):
    """Settings of an ingress.

    Attributes:
        max_body_bytes: of a request; None is `JINA_V4_MAX_BODY_BYTES`, as for every server.
        body_timeout_s: the time in which a request's body must arrive; None is `JINA_V4_BODY_TIMEOUT_S`.
        wait_s: a request that waits longer than this for a replica is refused with 503.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: Annotated[int, Field(ge=1)] | None = None
    body_timeout_s: Annotated[int, Field(ge=1)] | None = None
    wait_s: Annotated[float, Field(gt=0)] = 10


class RaySettings(ServerSettings, IngressSettings):
    """All settings of `deploy/ray/serve_app.py`; other options of Ray Serve belong in its config file.

    Attributes:
        tasks: to serve.
        min_replicas: per task.
        max_replicas: per task; if it is more than `min_replicas`, Ray scales by requests in flight.
        target_ongoing_requests: per replica; scaling aims at this number.
        upscale_delay_s: how long there must be too many requests before replicas are added.
        downscale_delay_s: how long there must be too few requests before replicas are removed.
        max_ongoing_requests: per replica; more requests wait for another replica.
        max_surge_percent: the replicas that an update adds before it removes old ones; 0 if no GPU is free for them.
        stop_s: the time to answer the requests in flight when a replica is removed.
        ingress_replicas: of the deployment that all requests pass.
    """

    tasks: Annotated[tuple[Task, ...], BeforeValidator(_split), Field(min_length=1)] = get_args(Task)
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 256
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 20
    stop_s: Annotated[float, Field(gt=0)] = 45
    ingress_replicas: Annotated[int, Field(ge=1)] = 1

    def part(self, kind: type[Part]) -> Part:
        """Return the settings of one of the deployments."""
        return kind.model_validate(self.model_dump(include=set(kind.model_fields)))
