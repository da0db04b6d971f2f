"""An independent oracle: plain transformers runs the base with the adapters *not* folded.

Nothing here uses our packages. The base's tensors are loaded by hand, each adapter is a forward hook on the layer it
belongs to, and pooling is written out as FACTS state it, so that a mistake in folding, serving or pooling cannot hide
by being made twice. Everything runs in float32 on the CPU, one input at a time.

tests/ is on pytest's path: `from oracle import oracle_vectors`.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Vectors:
    """What a model makes of some texts and images, each list in the order of the inputs.

    Attributes:
        text_dense: Each (hidden,), unit length.
        text_multi: Each (n_tokens, projector dim), unit rows.
        image_dense: Each (hidden,), unit length.
        image_multi: Each (n_image_tokens + 11, projector dim), unit rows.
    """

    text_dense: list[Array]
    text_multi: list[Array]
    image_dense: list[Array]
    image_multi: list[Array]


def oracle_vectors(
    base_dir: Path,
    task: str,
    texts: Sequence[str] = (),
    images: Sequence[Path] = (),
    prompt_name: str | None = "query",
    max_length: int | None = None,
) -> Vectors:
    """Return the vectors of one task, computed from a base with its adapters unfolded.

    Args:
        base_dir: A base in the published layout: config.json, shards, adapters/, tokenizer.json, preprocessor.
        task: retrieval, text-matching or code.
        texts: Without prefix; `Query: ` or `Passage: ` is put before each, or nothing.
        images: Image files, read as RGB.
        prompt_name: query or passage, text-matching takes query for both; or None.
        max_length: Texts are cut to so many tokens, prefix included.
    """
    model, projector = _load_base(base_dir)
    with _adapted(model, projector, base_dir, task):
        return _vectors(base_dir, model, projector, task, texts, images, prompt_name, max_length)


def folded_vectors(
    checkpoint_dir: Path,
    task: str,
    texts: Sequence[str] = (),
    images: Sequence[Path] = (),
    prompt_name: str | None = "query",
    max_length: int | None = None,
) -> Vectors:
    """Return the same from a folded checkpoint, loaded by plain transformers; arguments as in `oracle_vectors`."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_dir, dtype=torch.float32).eval()
    weights = load_file(checkpoint_dir / "multi_vector_projector.safetensors")
    projector = _projector(weights["multi_vector_projector.weight"], weights["multi_vector_projector.bias"])
    return _vectors(checkpoint_dir, model, projector, task, texts, images, prompt_name, max_length)


def cut(dense: Array, dim: int) -> Array:
    """Return a dense vector cut to `dim` and normalised again."""
    return dense[:dim] / np.linalg.norm(dense[:dim])


def _load_base(base_dir: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, torch.nn.Linear]:
    config = json.loads((base_dir / "config.json").read_text())
    kept = ("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id")
    config = {key: config[key] for key in (*kept, "vision_end_token_id", "tie_word_embeddings")}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).float().eval()
    state = {}
    for path in sorted(base_dir.glob("model*.safetensors")):
        state |= {name: tensor.float() for name, tensor in load_file(path).items()}
    projector = _projector(state.pop("multi_vector_projector.weight"), state.pop("multi_vector_projector.bias"))
    renamed = {re.sub(r"^visual\.", "model.visual.", name): tensor for name, tensor in state.items()}
    renamed = {re.sub(r"^model\.(?!visual\.)", "model.language_model.", name): t for name, t in renamed.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"{base_dir}: missing {missing}, unexpected {unexpected}")
    return model, projector


def _projector(weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Linear:
    projector = torch.nn.Linear(weight.shape[1], weight.shape[0])
    projector.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return projector


@contextlib.contextmanager
def _adapted(
    model: Qwen2_5_VLForConditionalGeneration, projector: torch.nn.Linear, base_dir: Path, task: str
) -> Iterator[None]:
    """Add `scaling * B A x` to the output of every layer that the task has an adapter for."""
    config = json.loads((base_dir / "adapters" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(base_dir / "adapters" / "adapter_model.safetensors")
    modules = dict(model.named_modules()) | {"multi_vector_projector": projector}
    hooks = []
    for name, a in tensors.items():
        if not name.endswith(f".lora_A.{task}.weight"):
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        module = modules[name.removeprefix("base_model.model.").removesuffix(f".lora_A.{task}.weight")]

        hooks.append(module.register_forward_hook(functools.partial(_add, a.float(), scaling * b.float())))
    if not hooks:
        raise ValueError(f"{base_dir}: no adapter of {task}")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    a: torch.Tensor, b: torch.Tensor, _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    return output + inputs[0] @ a.T @ b.T


@torch.inference_mode()
def _vectors(
    folder: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    projector: torch.nn.Linear,
    task: str,
    texts: Sequence[str],
    images: Sequence[Path],
    prompt_name: str | None,
    max_length: int | None,
) -> Vectors:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix = "Passage: " if prompt_name == "passage" and task != "text-matching" else "Query: "
    prefix = prefix if prompt_name else ""
    vectors = Vectors([], [], [], [])
    for text in texts:
        ids = torch.tensor([tokenizer.encode(prefix + text, add_special_tokens=False).ids[:max_length]])
        rows = model.model(input_ids=ids).last_hidden_state[0]  # (n_tokens, hidden)
        vectors.text_dense.append(_unit(rows.mean(0)))
        vectors.text_multi.append(_unit(projector(rows)))
    processor = Qwen2VLImageProcessor.from_pretrained(folder)
    for path in images:
        with Image.open(path) as image:
            pixels = processor(images=[image.convert("RGB")], return_tensors="pt")
        n_image_tokens = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
        prompt = (
            "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * n_image_tokens + "<|vision_end|>"
            "Describe the image.<|im_end|>\n"
        )
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        rows = model.model(
            input_ids=ids,
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=(ids == tokenizer.token_to_id("<|image_pad|>")).int(),
        ).last_hidden_state[0]  # (n_image_tokens + 11, hidden)
        start, end = (
            int((ids[0] == tokenizer.token_to_id(f"<|vision_{side}|>")).nonzero()) for side in ("start", "end")
        )
        vectors.image_dense.append(_unit(rows[start : end + 1].mean(0)))
        vectors.image_multi.append(_unit(projector(rows)))
    return vectors


def _unit(rows: torch.Tensor) -> Array:
    return torch.nn.functional.normalize(rows, dim=-1).numpy()
