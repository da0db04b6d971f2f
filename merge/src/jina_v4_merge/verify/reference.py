"""Embedding texts and an image with plain transformers on the CPU, from a folded checkpoint or an unfolded base.

Source of the pooling: the published model's `get_single_vector_embeddings`, as in the server: the mean over every token
of the prefixed text, or of an image from its start token to its end token, unit length; every token's row through the
projector, unit rows.
"""

import base64
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from tokenizers import Tokenizer

from jina_v4_merge.errors import ConfigError, WeightError
from jina_v4_merge.files import read_json
from jina_v4_merge.prompts import IMAGE_PROMPT
from jina_v4_merge.quantize import dequantize, scale_name, weight_name
from jina_v4_merge.reading.adapters import read_adapters
from jina_v4_merge.reading.configs import CONFIG_NAME, PREPROCESSOR_NAME, TOKENIZER_NAME, pixel_settings
from jina_v4_merge.reading.layout import PROJECTOR_BIAS, PROJECTOR_WEIGHT, is_adapted, module_name, stock_shapes
from jina_v4_merge.reading.model import Model
from jina_v4_merge.reading.weights import StoredTensor, base_tensors, stored_tensors
from jina_v4_merge.verify.canary import Entry, largest_distance, texts, write_canary
from jina_v4_merge.verify.checks import Verified
from jina_v4_merge.verify.picture import MAX_PIXELS, SCALED, Pixels, draw, patches, png, positions
from jina_v4_merge.writing.checkpoint import ADAPTER, BASE, MANIFEST_NAME, PROJECTOR_NAME
from jina_v4_merge.writing.shards import DTYPES

_ROOM_BYTES = 1 << 30  # apart from the weights: torch itself, activations
_MEMORY = Path("/proc/meminfo")
# 1 - cosine that rounding alone may make between folded and unfolded, by dtype of weights or of computing. Quantized
# weights made 4.0e-4 (int8) and 5.4e-3 (fp8) on 3 layers, 2.3e-4 and 5.2e-3 on 36; another task's adapter makes 0.5.
_BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 3e-2, "fp8": 1e-1}


def affordable_dtype(tensors: Mapping[str, StoredTensor], dtype: str) -> str:
    """Return the dtype to compute in: float32 where the weights fit the free memory so, else that of the checkpoint."""
    n_bytes = sum(math.prod(tensor.shape) for tensor in tensors.values()) * torch.float32.itemsize
    for line in _MEMORY.read_text().splitlines() if _MEMORY.exists() else []:
        name, _, value = line.partition(":")
        if name == "MemAvailable" and int(value.split()[0]) * 1024 < n_bytes + _ROOM_BYTES:
            return dtype
    return "float32"


def make_canary(checkpoint: Verified, model: Model | None = None) -> str:
    """Compute the canary of a checkpoint, or of an exported adapter, that was found good, and put it there.

    Args:
        checkpoint: A good one; not an exported base, which has no task.
        model: The base and its adapters. With them the vectors are computed a second time, with the adapters not
            folded, and must agree: a canary of a wrong fold would guard the mistake.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: transformers is not installed.
        SourceError: there is no base beside an exported adapter.
        WeightError: folded and unfolded disagree.
        OutputError: the canary cannot be written.
    """
    manifest = checkpoint.manifest
    if checkpoint.part == ADAPTER:
        reference, dtype = _adapted(checkpoint.folder, manifest["task"])
    else:
        dtype = affordable_dtype(checkpoint.tensors, manifest["dtype"])
        reference = ReferenceModel(checkpoint.folder, dtype, quantized=checkpoint.quantized is not None)
    wanted = texts(manifest["prompts"])
    entries, image = reference.embed(wanted, manifest["prompts"]), reference.embed_image()
    done = f"canary of {len(entries)} texts and an image, computed in {dtype}"
    if model is not None:
        for name in filter(is_adapted, model.tensors):
            reference.unfold(name, model.tensors[name].read(), *model.lora(manifest["task"], name))
        unfolded = [*reference.embed(wanted, manifest["prompts"]), reference.embed_image()]
        distance = largest_distance([*entries, image], unfolded)
        bound = max(_BOUNDS[part] for part in (dtype, manifest["dtype"], checkpoint.quantized) if part)
        if not distance <= bound:
            raise WeightError(
                f"{checkpoint.folder}: with the adapters of {model.adapter_source.name} unfolded the same items embed "
                f"otherwise (1 - cosine is {distance:.1e}, at most {bound:.0e} is allowed); no canary is written"
            )
        done += f"; unfolded the same within {distance:.1e} (1 - cosine)"
    write_canary(checkpoint.folder, entries, image, reference.computed)
    return done


def _adapted(folder: Path, task: str) -> tuple["ReferenceModel", str]:
    """Load the base beside an exported adapter, and the adapter unfolded; return them and the dtype computed in."""
    base = folder.parent / BASE
    manifest = read_json(base / MANIFEST_NAME)
    dtype = affordable_dtype(base_tensors(base), manifest["dtype"])
    reference = ReferenceModel(base, dtype, folder / PROJECTOR_NAME)
    adapters = read_adapters(folder, [task], stock_shapes(read_json(base / CONFIG_NAME)))
    for name, scaling in adapters.scalings[task].items():
        a, b = adapters.pair(task, name)
        reference.adapt(name, a.read(), b.read(), scaling)
    return reference, dtype


class ReferenceModel:
    """A folded checkpoint, or a base, in plain transformers."""

    def __init__(
        self, folder: Path, dtype: str, projector_file: Path | None = None, *, quantized: bool = False
    ) -> None:
        """Load it.

        Args:
            folder: Of the checkpoint.
            dtype: To compute in.
            projector_file: Of the projector, where it is not the checkpoint's own.
            quantized: Whether matrices are quantized. They are dequantized; activations are not rounded, as they are in
                a server.

        Raises:
            ConfigError: transformers is not installed.
        """
        try:
            from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
            from transformers.utils import logging
        except ImportError as error:
            raise ConfigError(
                f"a canary is computed with transformers, which cannot be imported here ({error}): "
                "install jina-v4-merge[canary]"
            ) from error
        logging.disable_progress_bar()  # type: ignore[no-untyped-call] # transformers'
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if quantized:
                config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
                del config.quantization_config
                source: Any = {"config": config, "state_dict": _dequantized(folder, DTYPES[dtype])}
            else:
                source = {"local_files_only": True}
            model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                None if quantized else folder, dtype=DTYPES[dtype], **source
            )
        self._model = model.eval()
        self._modules = dict(self._model.named_modules())
        self._pixel_settings = pixel_settings(read_json(folder / PREPROCESSOR_NAME))
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        projector = stored_tensors(projector_file or folder / PROJECTOR_NAME)
        weight = projector[PROJECTOR_WEIGHT].read().float()  # (projector dim, hidden)
        self._projector = torch.nn.Linear(weight.shape[1], weight.shape[0])
        self._projector.weight.data, self._projector.bias.data = weight, projector[PROJECTOR_BIAS].read().float()
        self.computed = {"dtype": dtype, "transformers": version("transformers"), "torch": version("torch")}

    def unfold(self, base_name: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """Put a layer back to the base's weight, and have it add `scaling * B A x` to its output.

        Args:
            base_name: The published name of the layer's weight.
            weight: The base's, (n_out, n_in).
            a: (rank, n_in).
            b: (n_out, rank).
            scaling: The factor on `B A`.
        """
        layer = self._layer(base_name)
        layer.weight.data = weight.to(layer.weight.dtype)
        self.adapt(base_name, a, b, scaling)

    def adapt(self, base_name: str, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """Have a layer add `scaling * B A x` to its output; as `unfold`, where the weight is the base's already."""
        layer = self._layer(base_name)
        dtype = layer.weight.dtype
        layer.register_forward_hook(partial(_add, a.to(dtype), scaling * b.to(dtype)))

    def _layer(self, base_name: str) -> Any:
        return self._projector if base_name == PROJECTOR_WEIGHT else self._modules[module_name(base_name)]

    @torch.inference_mode()
    def embed(self, texts: Sequence[tuple[str, str]], prompts: Mapping[str, str]) -> list[Entry]:
        """Embed texts one by one.

        Args:
            texts: Prompt name and text of each.
            prompts: Prompt name to prefix.
        """
        entries = []
        for prompt_name, text in texts:
            ids = self._tokenizer.encode(prompts[prompt_name] + text, add_special_tokens=False).ids
            item: dict[str, str | int] = {"prompt_name": prompt_name, "text": text}
            entries.append(self._entry(item, ids, slice(None)))
        return entries

    @torch.inference_mode()
    def embed_image(self, picture: Pixels | None = None, size: tuple[int, int] = SCALED) -> Entry:
        """Embed a picture, (height, width, 3), scaled to a size in pixels; None is the canary's own."""
        picture = draw() if picture is None else picture
        settings = self._pixel_settings
        height, width = (n_pixels // settings["patch_size"] for n_pixels in size)  # in patches
        values = patches(picture, size, settings).to(self._model.dtype)
        height_tokens, width_tokens = (n_patches // settings["merge_size"] for n_patches in (height, width))
        n_tokens = height_tokens * width_tokens
        ids = self._tokenizer.encode(IMAGE_PROMPT, add_special_tokens=False).ids
        start = ids.index(self._model.config.image_token_id)
        ids[start : start + 1] = [ids[start]] * n_tokens
        return self._entry(
            {"png": base64.b64encode(png(picture)).decode(), "max_pixels": MAX_PIXELS},
            ids,
            slice(start - 1, start + n_tokens + 1),
            pixel_values=values,
            image_grid_thw=torch.tensor([[1, height, width]]),
            position_ids=positions(start, height_tokens, width_tokens, len(ids) - start - n_tokens),
        )

    def _entry(self, item: Mapping[str, str | int], ids: list[int], pooled: slice, **image: torch.Tensor) -> Entry:
        rows = self._model.model(input_ids=torch.tensor([ids]), **image).last_hidden_state[0].float()
        dense = F.normalize(rows[pooled].mean(0), dim=-1)  # (hidden,)
        multivector = F.normalize(self._projector(rows), dim=-1)  # (n_tokens, projector dim)
        return Entry(item, dense.numpy(), multivector.numpy())


def _dequantized(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the weights of a quantized checkpoint, its matrices dequantized."""
    stored = base_tensors(folder, quantized=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if scales := stored.get(scale_name(name)):
            tensors[name] = dequantize(tensor.read(), scales.read()).to(dtype)
        elif name == weight_name(name):
            tensors[name] = tensor.read().to(dtype)
    return tensors


def _add(
    a: torch.Tensor, b: torch.Tensor, _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    return output + inputs[0] @ a.T @ b.T
