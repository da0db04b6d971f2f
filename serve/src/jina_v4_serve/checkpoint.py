"""Checks that a merged checkpoint is complete and of the right task.

Names and sizes are compared with the manifest, and the headers of the weight files with the index. The content is not
hashed, as 7.5 GB would take longer than the start: `jina-v4-merge verify` and the canary check it.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jina_v4_serve.errors import CheckpointError
from jina_v4_serve.facts import MAX_MODEL_LEN, PROMPT_NAMES

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
CANARY = "canary.json"
MANIFEST_FORMAT = CANARY_FORMAT = 1
PROJECTOR = "multi_vector_projector.safetensors"
# The task in an exported base's manifest; its adapters are in folders beside it (`exported`).
BASE = "base"
# The name of each dtype in safetensors files, and its bytes per value.
STORED_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
# The same for quantized matrices of the language model, and the name of their format in config.json.
QUANTIZED_DTYPES = {"int8": ("I8", 1), "fp8": ("F8_E4M3", 1)}
FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}
SCALE = "_scale"  # the scales of a quantized matrix have its name with this ending; they are float32
# A loader may read any file with such an ending, even an unlisted one: weights, settings (processor_config.json wins
# over preprocessor_config.json), chat templates, vocabularies, code.
_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", "_templates", ".txt", ".model", ".py")


@dataclass(frozen=True)
class Checkpoint:
    """A complete merged checkpoint on disk.

    Attributes:
        digest: a hash of the listed files. Equal files have equal digests, whoever folded them and when.
        quantized: `int8` or `fp8` if the language model's matrices are quantized, else None.
        weight_bytes: the size of all shards on disk.
        quantized_bytes: the part of it that --dtype does not change: quantized matrices and their scales.
        n_layers: the layers of the language model.
        kv_values: how many numbers the keys and values of one token are, in all layers.
    """

    folder: Path
    task: str
    dtype: str
    digest: str
    max_positions: int
    min_pixels: int
    max_pixels: int
    weight_bytes: int
    n_layers: int
    kv_values: int
    random_weights: bool
    quantized: str | None = None
    quantized_bytes: int = 0

    @property
    def precision(self) -> str:
        """The dtype of the weights, and the quantization if there is one: bfloat16+int8."""
        return self.dtype if self.quantized is None else f"{self.dtype}+{self.quantized}"

    @property
    def max_model_len(self) -> int:
        """The tokens of the longest sequence that is served."""
        return min(MAX_MODEL_LEN, self.max_positions)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one task.

    Attributes:
        prefixes: the prefixes of texts, by prompt name.
        image: the prompt of an image, in which one token stands for the image.
    """

    prefixes: Mapping[str, str]
    image: str


@contextmanager
def readable() -> Iterator[None]:
    """Raise a CheckpointError for a folder or file that this user may not read, or that the disk fails to return."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read: {error.strerror}. This user must be allowed to read the checkpoint, and "
            "to enter the folders above it"
        ) from error


@readable()
def read_checkpoint(folder: Path, task: str) -> Checkpoint:
    """Check a folder against its manifest.

    Raises:
        CheckpointError: the folder is missing, incomplete, of another task, or not a merged checkpoint.
    """
    manifest = read_manifest(folder, task)
    dtype, quantized, files = manifest["dtype"], manifest.get("quantized"), manifest["files"]
    weight_bytes, quantized_bytes = _check_weights(folder, dtype, quantized, files)
    check_canary(folder)
    config = read_json(folder / "config.json")
    _check_format(folder, quantized, config.get("quantization_config"))
    text_config = config.get("text_config", config)
    min_pixels, max_pixels = read_pixels(folder)
    return Checkpoint(
        folder=folder,
        task=task,
        dtype=dtype,
        digest=digest_of(files),
        max_positions=int(text_config["max_position_embeddings"]),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        weight_bytes=weight_bytes,
        n_layers=int(text_config["num_hidden_layers"]),
        kv_values=_kv_values(text_config),
        random_weights="standin" in ((manifest.get("sources") or {}).get("base") or {}),
        quantized=quantized,
        quantized_bytes=quantized_bytes,
    )


def read_manifest(folder: Path, task: str) -> dict[str, Any]:
    """Read the manifest of a checkpoint or of an exported folder, and compare names and sizes of all files with it.

    Raises:
        CheckpointError: the folder is missing, incomplete, of another task, or not from `jina-v4-merge`; or it has an
            unlisted file that might be loaded.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}. `jina-v4-merge fold --base BASE --out DIR` makes checkpoints")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a checkpoint of `jina-v4-merge fold`"
            " (choose the folder of one task, such as DIR/jina-embeddings-v4-retrieval)"
        )
    manifest = read_json(folder / MANIFEST)
    try:
        manifest_format, manifest_task, _ = manifest["format"], manifest["task"], manifest["dtype"]
        sizes = {str(name): int(entry["size"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of `jina-v4-merge fold`: {error!r}") from error
    if manifest_format != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{folder} was written in format {manifest_format} of checkpoints, and this version of jina-v4-serve reads"
            f" format {MANIFEST_FORMAT}: install the version that came with the jina-v4-merge that wrote it"
        )
    if manifest_task != task:
        raise CheckpointError(f"{folder} is the checkpoint of task {manifest_task}, not of {task}")
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing. Fold it again")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}. Fold it again")
    for path in sorted(folder.iterdir()):
        is_listed = path.name in {*sizes, MANIFEST, CANARY}
        if path.name.endswith(_LOADED) and not is_listed and not path.name.startswith("."):
            raise CheckpointError(f"{path} does not belong to this checkpoint and might be loaded: remove it")
    return manifest


def _check_weights(folder: Path, dtype: str, quantized: str | None, files: Collection[str]) -> tuple[int, int]:
    """Compare the headers of the weight files with the index.

    Returns:
        The bytes of all shards, and the bytes of the quantized matrices and their scales.

    Raises:
        CheckpointError: they disagree; the message names the file and the tensor.
    """
    if dtype not in STORED_DTYPES:
        raise CheckpointError(f"{folder / MANIFEST} says dtype {dtype}; it must be one of {', '.join(STORED_DTYPES)}")
    if quantized not in (None, *QUANTIZED_DTYPES):
        one_of = ", ".join(QUANTIZED_DTYPES)
        raise CheckpointError(f"{folder / MANIFEST} says quantized {quantized}; it must be one of {one_of}")
    index = read_json(folder / INDEX)
    try:
        indexed = {(str(name), str(file)) for name, file in index["weight_map"].items()}
        total_size = int(index["metadata"]["total_size"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is not an index of weights: {error!r}. Fold it again") from error
    shards = {file for _, file in indexed}
    stored: set[tuple[str, str]] = set()
    n_bytes = quantized_bytes = 0
    for file in sorted(name for name in files if name.endswith(".safetensors")):
        tensors = read_tensors(folder / file, dtype, quantized)
        quantized_bytes += sum(tensor.n_bytes for tensor in tensors.values() if tensor.is_quantized)
        if file in shards:
            stored |= {(name, file) for name in tensors}
            n_bytes += sum(tensor.n_bytes for tensor in tensors.values())
    if odd := sorted(indexed ^ stored):
        name, file = odd[0]
        raise CheckpointError(f"{folder / INDEX} and {file} disagree about {name}. Fold it again")
    if n_bytes != total_size:
        raise CheckpointError(f"{folder / INDEX} says {total_size} bytes, the shards hold {n_bytes}. Fold it again")
    if (quantized is None) != (quantized_bytes == 0):
        raise CheckpointError(f"{folder}: the manifest says quantized {quantized}, the weights do not. Fold it again")
    return total_size, quantized_bytes


def _check_format(folder: Path, quantized: str | None, config: Any) -> None:
    """Check that config.json, which vLLM reads, has the quantization of the manifest.

    Raises:
        CheckpointError: they disagree.
    """
    format_ = config.get("format") if isinstance(config, Mapping) else config
    if format_ != (FORMATS[quantized] if quantized else None):
        raise CheckpointError(
            f"{folder / 'config.json'} has weights of format {format_}, the manifest says"
            f" {quantized or 'not quantized'}. Fold it again"
        )


@dataclass(frozen=True)
class Tensor:
    """A tensor in the header of a file.

    Attributes:
        n_bytes: its size on disk.
        is_quantized: whether it is a quantized matrix, or the scales of one.
    """

    shape: tuple[int, ...]
    n_bytes: int
    is_quantized: bool


def read_tensors(path: Path, dtype: str, quantized: str | None = None) -> dict[str, Tensor]:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the file is broken, or a tensor has neither the dtype nor, with its scales, the quantized one.
    """
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            headers = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is broken: {error!r}. Fold it again") from error
    scales = [name for name in headers if quantized is not None and name.endswith(SCALE)]
    matrices = [scale.removesuffix(SCALE) for scale in scales]
    other_dtypes = {**dict.fromkeys(scales, "float32"), **dict.fromkeys(matrices, quantized)}
    tensors = {}
    for name, (code, shape) in headers.items():
        expected = other_dtypes.get(name) or dtype
        expected_code, item_bytes = (STORED_DTYPES | QUANTIZED_DTYPES)[expected]
        if code != expected_code:
            raise CheckpointError(f"{path}: {name} is {code}, the manifest says {expected}. Fold it again")
        tensors[name] = Tensor(shape, math.prod(shape) * item_bytes, name in other_dtypes)
    return tensors


def check_canary(folder: Path) -> None:
    """Refuse a canary of another checkpoint, or of an older fold.

    Raises:
        CheckpointError: the message has the command that makes a new one.
    """
    if not (folder / CANARY).exists():
        return
    manifest_sha256 = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    if read_json(folder / CANARY).get("manifest_sha256") != manifest_sha256:
        raise CheckpointError(
            f"{folder / CANARY} was made for another checkpoint or an older fold; make it again with"
            f" `jina-v4-merge verify {folder} --canary`, or remove it"
        )


def digest_of(files: Mapping[str, Any]) -> str:
    """Return one digest for the files that a manifest lists."""
    sums = sorted((str(name), str(entry.get("sha256"))) for name, entry in files.items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def read_pixels(folder: Path) -> tuple[int, int]:
    """Read the smallest and the largest image area of a checkpoint.

    Raises:
        CheckpointError: they are missing.
    """
    path = folder / "preprocessor_config.json"
    limits = read_json(path)
    try:
        # Newer processors write the same limits as the edges of a size.
        size = limits.get("size", {})
        smallest = limits.get("min_pixels") or size["shortest_edge"]
        largest = limits.get("max_pixels") or size["longest_edge"]
        return int(smallest), int(largest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has no min_pixels and max_pixels. Fold it again") from error


def read_prompts(folder: Path) -> Prompts:
    """Read the prompts from the manifest of a checkpoint or an adapter.

    Raises:
        CheckpointError: they are missing.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        prefixes = {str(name): str(prefix) for name, prefix in manifest["prompts"].items()}
        image = str(manifest["image_prompt"])
        if missing := set(PROMPT_NAMES) - prefixes.keys():
            raise KeyError(*missing)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} has no prompts ({error!r}). Fold it again") from error
    return Prompts(prefixes, image)


def read_quantized(folder: Path) -> str | None:
    """Read from the manifest how the language model's matrices are quantized; None if they are not."""
    quantized: str | None = read_json(folder / MANIFEST).get("quantized")
    return quantized


def _kv_values(config: dict[str, Any]) -> int:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content
