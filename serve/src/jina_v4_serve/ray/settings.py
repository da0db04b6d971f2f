"""What is deployed: the arguments of `serve run` and of `args` in a config file.

They are in parts: each deployment is started with those that concern it, the rest is told to Ray Serve.
"""

import shlex
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Task = Literal["retrieval", "text-matching", "code"]
Part = TypeVar("Part", bound=BaseModel)


def _split(value: object) -> object:
    """Split what comes from a command line, where everything is one text."""
    return shlex.split(value) if isinstance(value, str) else value


class ServerSettings(BaseModel):
    """What a replica is started with.

    Attributes:
        checkpoints: the folder that holds the merged checkpoints, on every node.
        num_gpus: a replica; less than 1 shares a GPU, and its memory likewise.
        num_cpus: a replica; without a GPU also the threads that it computes with.
        dtype: as of `jina-v4-serve`.
        max_pixels: as of `jina-v4-serve`.
        vllm_options: as behind the -- of `jina-v4-serve`.
        timeout_s: within which a server must begin, and go on with, its answer.
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
    """What an ingress is started with.

    Attributes:
        max_body_bytes: of a request.
        body_timeout_s: within which a request's body must have arrived.
        wait_s: a request that no replica has taken for so long is refused with 503.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    body_timeout_s: Annotated[float, Field(gt=0)] = 60
    wait_s: Annotated[float, Field(gt=0)] = 10


class RaySettings(ServerSettings, IngressSettings):
    """All that `deploy/ray/serve_app.py` can be told; whatever else Ray Serve knows is said in its config file.

    Attributes:
        tasks: that are served.
        min_replicas: of each task.
        max_replicas: of each task; more than `min_replicas` has Ray scale by requests in flight.
        target_ongoing_requests: a replica, by which it is scaled.
        upscale_delay_s: for which there must be too many requests.
        downscale_delay_s: for which there must be too few.
        max_ongoing_requests: a replica; what comes beyond it waits for another.
        max_surge_percent: replicas that an update adds before it takes old ones away; 0 where no GPU is free for one.
        stop_s: what is in flight when a replica is taken away has so long to be answered.
        ingress_replicas: of the one deployment that all requests pass.
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
        """Return the part that one of the deployments is started with."""
        return kind.model_validate(self.model_dump(include=set(kind.model_fields)))
