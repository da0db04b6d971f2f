"""Writing a stand-in: a model with random weights in the published file layout.

It is for demos, tests and benchmarks on machines without the real weights. Its vectors mean nothing; that is written
in its config.json, in its README.md, and in the manifest of every checkpoint folded from it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from jina_v4_merge import adapters, sources, standin_config
from jina_v4_merge.checkpoint import index, json_bytes
from jina_v4_merge.digests import write_file
from jina_v4_merge.image_settings import PREPROCESSOR_NAME
from jina_v4_merge.layout import Shape, adapter_shapes, base_shapes
from jina_v4_merge.progress import progress
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.shards import ShardSeries, file_size, planned
from jina_v4_merge.space import require_space
from jina_v4_merge.staging import publish, require_absent, staging
from jina_v4_merge.standin_tokenizer import tokenizer_files
from jina_v4_merge.threads import one_thread
from jina_v4_merge.weights import INDEX_NAME

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
    config = standin_config.model_config(size, seed, ids)
    files |= {
        sources.CONFIG_NAME: json_bytes(config),
        PREPROCESSOR_NAME: json_bytes(standin_config.preprocessor_config()),
        sources.GENERATION_NAME: json_bytes({}),
        "README.md": _README.format(size=size, seed=seed).encode(),
        f"{sources.ADAPTERS_FOLDER}/{adapters.CONFIG_NAME}": json_bytes(standin_config.adapter_config()),
    }
    base = base_shapes(config)
    shards = _two_shards(base)
    lora = adapter_shapes(base, TASKS, lambda _task, _name: standin_config.RANK)
    files[INDEX_NAME] = index({name: file for file, shapes in shards.items() for name in shapes}, _n_bytes(base))
    weights = {**shards, f"{sources.ADAPTERS_FOLDER}/{adapters.WEIGHTS_NAME}": lora}
    with staging(folder.parent) as stage:
        sizes = [file_size(planned(shapes, _DTYPE)) for shapes in weights.values()] + [
            len(held) for held in files.values()
        ]
        require_space(folder.parent, [1, 1, *sizes])  # two folders
        target = stage / folder.name
        (target / sources.ADAPTERS_FOLDER).mkdir(parents=True)
        with one_thread(), progress("standin", _n_bytes(base | lora)) as written:
            _write(target, weights, seed, written)
        for name, content in files.items():
            write_file(target / name, content)
        n_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        publish([target], folder.parent)
    return n_bytes


def _n_bytes(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * _DTYPE.itemsize


def _two_shards(shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Cut the tensors into two files, the first about twice as large, as published."""
    first: dict[str, Shape] = {}
    second: dict[str, Shape] = {}
    for name, shape in shapes.items():
        (first if 3 * _n_bytes(first) < 2 * _n_bytes(shapes) else second)[name] = shape
    return {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}


def _write(folder: Path, files: Mapping[str, Mapping[str, Shape]], seed: int, written: Callable[[int], object]) -> None:
    shards = [(name, planned(shapes, _DTYPE)) for name, shapes in files.items()]
    with closing(ShardSeries(folder, shards)) as series:
        for shapes in files.values():
            for name, shape in shapes.items():
                for rows in _random_blocks(name, shape, seed):
                    series.append(name, rows)
                    written(rows.nbytes)


def _random_blocks(name: str, shape: Shape, seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor, a block at a time; what they are hangs on its name and the seed alone.

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
