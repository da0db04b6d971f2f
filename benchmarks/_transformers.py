"""transformers as the model card does it, and sentence-transformers: batches in the order given, padded to the longest.

The pooling is that of the published model: the mean over a text's tokens, over an image's vision span; unit length.
"""

import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from _child import Vectors
from _data import PREFIX
from jina_v4_merge.prompts import IMAGE_PROMPT
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLModel, Qwen2VLImageProcessor
from transformers.utils import logging

IMAGE_PAD = "<|image_pad|>"
TEXT_BATCH_SIZE = 8  # the model card's, for sentence-transformers too


class Transformers:
    """The folded checkpoint in plain transformers."""

    def __init__(self, checkpoint: Path, dtype: str, batch_size: int) -> None:
        """Load it onto the GPU where there is one."""
        logging.disable_progress_bar()
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Qwen2_5_VLModel.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
        self.model = self.model.eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        self.tokenizer.padding_side = "right"
        self.images = Qwen2VLImageProcessor.from_pretrained(checkpoint)
        tensors = load_file(checkpoint / "multi_vector_projector.safetensors", device=str(self.device))
        self.weight, self.bias = (tensors[f"multi_vector_projector.{name}"].float() for name in ("weight", "bias"))
        ids = self.tokenizer.convert_tokens_to_ids([IMAGE_PAD, "<|vision_start|>", "<|vision_end|>"])
        self.pad, self.start, self.end = ids
        self.about = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "batch_size": batch_size,
        }

    @torch.inference_mode()
    def embed(self, kind: str, items: list[Any], output: str) -> Vectors:
        """Embed batch after batch."""
        vectors: Vectors = {name: [] for name in ("dense", "multivector") if output in (name, "both")}
        for first in range(0, len(items), self.batch_size):
            batch = items[first : first + self.batch_size]
            given, pooled = self._texts(batch) if kind == "text" else self._images(batch)
            given = {name: tensor.to(self.device) for name, tensor in given.items()}
            real, pooled = given["attention_mask"].bool(), pooled.to(self.device)  # both (batch, length)
            rows = self.model(**given, use_cache=False).last_hidden_state.float()  # (batch, length, hidden)
            if "dense" in vectors:
                sums = (rows * pooled.unsqueeze(-1)).sum(1)  # (batch, hidden)
                means = sums / pooled.sum(1, keepdim=True)
                vectors["dense"] += list(F.normalize(means, dim=-1).cpu().numpy())
            if "multivector" in vectors:
                projected = F.normalize(F.linear(rows, self.weight, self.bias), dim=-1)  # (batch, length, 128)
                vectors["multivector"] += [each[kept].cpu().numpy() for each, kept in zip(projected, real, strict=True)]
        return vectors

    def _texts(self, texts: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = self.tokenizer([PREFIX + text for text in texts], padding=True, return_tensors="pt")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"]

    def _images(self, files: list[bytes]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        pixels = self.images(images=[_open(file) for file in files], return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(1) // self.images.merge_size**2).tolist()
        prompts = [IMAGE_PROMPT.replace(IMAGE_PAD, IMAGE_PAD * count) for count in counts]
        batch = self.tokenizer(prompts, padding=True, return_tensors="pt")
        ids = batch["input_ids"]  # (batch, length)
        pooled = (ids == self.pad) | (ids == self.start) | (ids == self.end)
        given = {
            "input_ids": ids,
            "attention_mask": batch["attention_mask"],
            "pixel_values": pixels["pixel_values"],  # (patches of all, 1176)
            "image_grid_thw": pixels["image_grid_thw"],  # (batch, 3)
            "mm_token_type_ids": (ids == self.pad).int(),
        }
        return given, pooled


class SentenceTransformers:
    """The folded checkpoint in sentence-transformers' own modules; texts only."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        """Load it."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer

        body = Transformer(
            str(checkpoint),
            model_kwargs={"dtype": dtype, "local_files_only": True},
            processor_kwargs={"local_files_only": True},
            # Left to itself it would send texts through the chat template, which is for images.
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
        )
        pooling = Pooling(body.get_embedding_dimension(), pooling_mode="mean")
        self.model = SentenceTransformer(modules=[body, pooling, Normalize()])
        dtype = next(self.model.parameters()).dtype
        self.about = {"dtype": str(dtype).removeprefix("torch."), "batch_size": TEXT_BATCH_SIZE}

    def embed(self, kind: str, items: list[Any], output: str) -> Vectors:
        """Embed texts, dense; it sorts them by length by itself."""
        if (kind, output) != ("text", "dense"):
            raise ValueError(f"{output} of {kind} is not offered")
        vectors = self.model.encode([PREFIX + item for item in items], batch_size=TEXT_BATCH_SIZE)  # (n, hidden)
        return {"dense": list(vectors)}


def _open(file: bytes) -> Image.Image:
    with Image.open(io.BytesIO(file)) as image:
        return image.convert("RGB")
