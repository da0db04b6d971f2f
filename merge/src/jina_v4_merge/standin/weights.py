"""Writing a stand-in: a model with random weights in the published file layout.

It is for demos, tests and benchmarks on machines without the real weights. Its vectors mean nothing; that is written
in its config.json, in its README.md, and in the manifest of every checkpoint folded from it.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from jina_v4_merge.files import json_bytes, write_file
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.reading.adapters import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from jina_v4_merge.reading.configs import CONFIG_NAME, GENERATION_NAME, PREPROCESSOR_NAME
from jina_v4_merge.reading.layout import Shape, adapter_shapes, base_shapes
from jina_v4_merge.reading.sources import ADAPTERS_FOLDER
from jina_v4_merge.reading.weights import INDEX_NAME
from jina_v4_merge.standin.config import RANK, adapter_config, model_config, preprocessor_config
from jina_v4_merge.standin.tokenizer import tokenizer_files
from jina_v4_merge.work import one_thread, progress
from jina_v4_merge.writing.filesystem import require_space
from jina_v4_merge.writing.shards import Planned, Shard, ShardSeries, file_size, index, name_shards, planned
from jina_v4_merge.writing.staging import publish, require_absent, staging

_DTYPE = torch.bfloat16
_BLOCK_VALUES = 4 << 20

# Standard deviations. The published model was initialised with 0.02 as well; with it a layer's output is about as
# large as its input. lora_B is what makes the tasks differ: with 0.05 an adapter adds about a quarter to a layer's
# output, and the vectors of one text for two tasks have a cosine of about 0.7.
_STD = 0.02
_STD_LORA_B = 0.05
_STD_NORM = 0.05  # around 1

_README = """\
# Stand-in for jina-embeddings-v4

**Random weights**: this model's vectors mean nothing. It has the file layout of the published model, for demos, tests
and benchmarks. Made by `jina-v4-merge standin --size {size} --seed {seed}`.
"""


def standin(folder: Path, size: str = "tiny", seed: int = 0) -> int:
    """Write a stand-in; the same bytes for the same size and seed.

    Args:
        folder: Where; must not exist yet.
        size: tiny (60 MB) or full (8 GB, the published shapes).
        seed: Of the weights.

    Returns:
        Its size in bytes.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    require_absent([folder])
    folder = folder.absolute()
    files, ids = tokenizer_files()
    config = model_config(size, seed, ids)
    shapes = base_shapes(config)
    shards = _two_shards(planned(shapes, _DTYPE))
    lora = planned(adapter_shapes(shapes, TASKS, lambda _task, _name: RANK), _DTYPE)
    files |= {
        CONFIG_NAME: json_bytes(config),
        PREPROCESSOR_NAME: json_bytes(preprocessor_config()),
        GENERATION_NAME: json_bytes({}),
        INDEX_NAME: index(shards),
        "README.md": _README.format(size=size, seed=seed).encode(),
        f"{ADAPTERS_FOLDER}/{ADAPTER_CONFIG_NAME}": json_bytes(adapter_config()),
    }
    weights: list[Shard] = [*shards, (f"{ADAPTERS_FOLDER}/{ADAPTER_WEIGHTS_NAME}", lora)]
    with staging(folder.parent) as stage:
        sizes = [file_size(tensors) for _, tensors in weights] + [len(content) for content in files.values()]
        require_space(folder.parent, [1, 1, *sizes])  # two folders
        target = stage / folder.name
        (target / ADAPTERS_FOLDER).mkdir(parents=True)
        n_value_bytes = sum(_n_bytes(tensors) for _, tensors in weights)
        with (
            one_thread(),
            closing(ShardSeries(target, weights)) as series,
            progress("standin", n_value_bytes) as written,
        ):
            for _, tensors in weights:
                for name, tensor in tensors.items():
                    for rows in _random_blocks(name, tensor.shape, seed):
                        series.append(name, rows)
                        written(rows.nbytes)
        for name, content in files.items():
            write_file(target / name, content)
        n_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        publish([target], folder.parent)
    return n_bytes


def _n_bytes(tensors: Mapping[str, Planned]) -> int:
    return sum(tensor.n_bytes for tensor in tensors.values())


def _two_shards(tensors: Mapping[str, Planned]) -> list[Shard]:
    """Cut the tensors into two files, the first about twice as large, as published."""
    first: dict[str, Planned] = {}
    second: dict[str, Planned] = {}
    for name, tensor in tensors.items():
        (first if 3 * _n_bytes(first) < 2 * _n_bytes(tensors) else second)[name] = tensor
    return name_shards([first, second])


def _random_blocks(name: str, shape: Shape, seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor, a block at a time; its name and the seed alone decide them.

    Uniform numbers, because torch makes those by exact arithmetic, the same on every machine, and normal ones not.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    mean, std = _distribution(name)
    bound = std * math.sqrt(3)
    n_rows = max(1, _BLOCK_VALUES // math.prod(shape[1:]))
    for start in range(0, shape[0], n_rows):
        block = torch.empty(min(n_rows, shape[0] - start), *shape[1:])
        yield block.uniform_(mean - bound, mean + bound, generator=generator).to(_DTYPE)


def _distribution(name: str) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor's values."""
    if "norm" in name or name.endswith("ln_q.weight"):
        return 1.0, _STD_NORM
    return 0.0, _STD_LORA_B if ".lora_B." in name else _STD
