"""`jina-v4-embed --ray`: the corpus as a pipeline of Ray Data, in which no row passes the driver.

`corpus` lists files (`embed.places`) and has them read, `worker` embeds, `parts` writes parquet parts, `run` puts them
together. The rest is Ray Data's: it shares out the work, holds readers back, replaces lost workers, and keeps
checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jina_v4_client.embed.content import Kind


@dataclass(frozen=True)
class Plan:
    """What every process of a run knows."""

    inputs: Sequence[str]  # files, folders or patterns, as paths or URIs
    output: str  # a folder
    address: str  # of the cluster; "local" starts one on this machine
    n_workers: int | None  # None for one a GPU of the cluster or an address, or one
    urls: Sequence[str]  # of servers; none to start one a worker
    server: Sequence[str]  # arguments of `jina-v4-serve`, for those that are started
    client: Mapping[str, Any]  # arguments of the clients, but for the address
    batch_sizes: Mapping[Kind, int]  # items a request
    options: Mapping[str, Any]  # those that decide about the vectors, by the name of the flag
    skip: bool  # a row that cannot be embedded gets an error; it stops the run otherwise
    quiet: bool  # show no progress
