"""The encoder that mteb calls: texts and images to a server, vectors and their scores back to mteb."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import mteb
import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

from jina_v4_client import scoring
from jina_v4_client._model import MAX_LENGTH, MULTIVECTOR_DIM, TASKS, PromptName, Task
from jina_v4_client.client import EmbeddingsClient
from jina_v4_client.errors import ArgumentError, WrongServerError
from jina_v4_client.integrations.mteb.mapping import RANKED, prompt_name_for, task_for

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from PIL import Image
    from torch.utils.data import DataLoader

Vector = NDArray[np.float32]

NAME: Final = "jina-v4-serve/jina-embeddings-v4"  # what mteb files the results under
PUBLISHED_NAME: Final = "jinaai/jina-embeddings-v4"
_ROUNDS = 4  # of requests, as many at a time as are allowed, between two looks into the data set


class JinaV4Encoder(AbsEncoder):
    """The model behind a server, as mteb wants it: ``mteb.evaluate(JinaV4Encoder("http://127.0.0.1:8000"), tasks)``.

    The address is that of a gateway, or of the server of the one task that is needed. Use it in a ``with`` block, or
    call :meth:`close`.

    mteb looks results up by the name, revision and settings in `mteb_model_meta`. The revision holds what the servers
    tell of their checkpoints, dtype and image size, and the client refuses vectors of another from then on; so what is
    found is always of the same model. Of a server that tells nothing, the revision is new each time and nothing is
    found, unless `revision` names it.

    Args:
        base_url: the server's or gateway's address.
        api_key: its key; JINA_V4_API_KEY of the environment if None.
        multivector: rank by MaxSim over a vector a token; only for tasks that rank documents.
        truncate_dim: 128, 256, 512, 1024 or 2048 dimensions of dense vectors; all if None.
        max_length: how many tokens of a text are read, its prefix included.
        max_pixels: larger images are scaled down to so many pixels; the server's limit if None.
        batch_size: texts a request. mteb's own batch size only says how a data set is read.
        image_batch_size: images a request.
        max_concurrency: requests on their way at a time.
        timeout_s: of a request.
        max_retries: of a request; 6 bridge about 20 seconds without a server.
        revision: names what a server serves that tells nothing of it; it goes before what servers tell.

    Raises:
        ArgumentError: one of these is not allowed.
        ServerError: the server does not answer.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        multivector: bool = False,
        truncate_dim: int | None = None,
        max_length: int = MAX_LENGTH,
        max_pixels: int | None = None,
        batch_size: int = 16,
        image_batch_size: int = 4,
        max_concurrency: int = 4,
        timeout_s: float = 600.0,
        max_retries: int = 6,
        revision: str | None = None,
    ) -> None:
        if multivector and truncate_dim is not None:
            raise ArgumentError(f"truncate_dim does not go with multivector: its rows always have {MULTIVECTOR_DIM}")
        self.multivector = multivector
        common = {"return_multivector": multivector, "truncate_dim": truncate_dim}
        self._of_texts: dict[str, Any] = {**common, "max_length": max_length, "batch_size": batch_size}
        self._of_images: dict[str, Any] = {**common, "max_pixels": max_pixels, "batch_size": image_batch_size}
        self._n_texts = batch_size * max_concurrency * _ROUNDS
        self._n_images = image_batch_size * max_concurrency * _ROUNDS
        self._client = EmbeddingsClient(
            base_url, api_key, max_concurrency=max_concurrency, timeout_s=timeout_s, max_retries=max_retries
        )
        try:
            self.revisions = _revisions(self._client)
        except BaseException:
            self._client.close()
            raise
        settings = {
            "multivector": multivector or None,
            "truncate_dim": truncate_dim,
            "max_length": None if max_length == MAX_LENGTH else max_length,
            "max_pixels": max_pixels,
        }
        self.mteb_model_meta = _meta(
            "_".join(filter(None, [revision, _told(self.revisions, secret=revision is None)])),
            {name: value for name, value in settings.items() if value is not None},
            multivector=multivector,
            dim=truncate_dim,
        )

    def encode(
        self,
        inputs: "DataLoader[BatchedInput]",
        *,
        task_metadata: "TaskMetadata",
        hf_split: str,  # noqa: ARG002 - mteb names its arguments
        hf_subset: str,  # noqa: ARG002
        prompt_type: "PromptType | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Embed what a task reads, in its order.

        The model takes a text or an image. An item with both gets, as in mteb's own wrapper of the published model,
        the sum of the two vectors at unit length, or the rows of both.

        Args:
            inputs: batches with "text", "image" or both.
            task_metadata: of the task; it decides about the adapter.
            hf_split: of no concern.
            hf_subset: of no concern.
            prompt_type: the side that the inputs are on, if the task has sides.
            **kwargs: show_progress_bar; others are of no concern.

        Returns:
            (n, dim) float32, or with multivector a list of n (n_tokens, 128) float32, ragged and without padding.

        Raises:
            ArgumentError: a task that the model, or MaxSim, is not for.
            ServerError: the server did not give the vectors.
        """
        task, prompt_name = task_for(task_metadata), prompt_name_for(prompt_type)
        if self.multivector and task_metadata.type not in RANKED:
            raise ArgumentError(
                f"{task_metadata.name} is of type {task_metadata.type}: mteb compares single vectors there, so it has"
                " no score for multi-vectors; run it without multivector"
            )
        total = len(inputs.dataset)  # type: ignore[arg-type]  # mteb's data sets have a length
        vectors: list[Vector] = []
        with tqdm(total=total, desc="Embedding", disable=not kwargs.get("show_progress_bar", False)) as bar:
            for block in self._blocks(inputs):
                vectors.extend(self._embed(block, task, prompt_name))
                bar.update(len(block))
        return vectors if self.multivector else np.stack(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Score all against all: cosine, or MaxSim in which no padding takes part.

        mteb's own MaxSim pads with zeros, which win wherever all similarities of a token are negative.

        Args:
            embeddings1: (n, dim), or multi-vectors: a list of (n_tokens, 128), or (n, n_tokens, 128).
            embeddings2: the same, m of them.

        Returns:
            (n, m) float32 tensor.
        """
        if not self.multivector:
            return super().similarity(embeddings1, embeddings2)
        return torch.from_numpy(scoring.maxsim(_ragged(embeddings1), _ragged(embeddings2)))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Score each of the one with its like of the other; (n,) float32 tensor. Arguments as for `similarity`."""
        if not self.multivector:
            return super().similarity_pairwise(embeddings1, embeddings2)
        pairs = zip(_ragged(embeddings1), _ragged(embeddings2), strict=True)
        return torch.tensor([float(scoring.maxsim(a, b)[0, 0]) for a, b in pairs])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        """Give the encoder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def _blocks(self, inputs: Iterable[Any]) -> Iterator["_Block"]:
        """Give the inputs in parts that keep all connections busy: a corpus of pages would not fit into memory."""
        block = _Block()
        for batch in inputs:
            block.texts += batch.get("text", [])
            block.images += batch.get("image", [])
            if len(block) >= (self._n_images if block.images else self._n_texts):
                yield block
                block = _Block()
        if len(block):
            yield block

    def _embed(self, block: "_Block", task: Task, prompt_name: PromptName) -> Sequence[Vector]:
        parts: list[Sequence[Vector]] = []
        if block.texts:
            parts.append(self._client.encode_text(block.texts, task, prompt_name=prompt_name, **self._of_texts))
        if block.images:
            parts.append(self._client.encode_image(block.images, task, **self._of_images))
        if len(parts) == 1:
            return parts[0]
        return [self._fuse(text, image) for text, image in zip(*parts, strict=True)]

    def _fuse(self, text: Vector, image: Vector) -> Vector:
        if self.multivector:
            return np.concatenate([text, image])  # (n_text_tokens + n_image_tokens, 128)
        total = text + image  # (dim,)
        return total / np.linalg.norm(total)


@dataclass
class _Block:
    """Inputs that are embedded together; where there are texts and images, each text goes with its image."""

    texts: list[str] = field(default_factory=list)
    images: "list[Image.Image]" = field(default_factory=list)

    def __len__(self) -> int:
        return max(len(self.texts), len(self.images))


def _revisions(client: EmbeddingsClient) -> dict[Task, str | None]:
    """Ask which tasks an address serves, and in which revision each; None where the server does not tell."""
    found: dict[Task, str | None] = {}
    refusals = []
    for task in TASKS:
        try:
            found[task] = client.revision(task)
        except WrongServerError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found


def _told(revisions: dict[Task, str | None], *, secret: bool) -> str:
    """Write the revisions of all tasks as one; with `secret`, untold ones as one that was never there before."""
    if not all(revisions.values()):
        return f"untold-{secrets.token_hex(8)}" if secret else ""
    return "_".join(f"{task}-{revision}" for task, revision in revisions.items())


def _meta(revision: str, settings: dict[str, Any], *, multivector: bool, dim: int | None) -> ModelMeta:
    """Describe the model to mteb: the published one, but for what serving it makes another."""
    meta = mteb.get_model_meta(PUBLISHED_NAME)
    return ModelMeta(
        **{name: getattr(meta, name) for name in ModelMeta.model_fields}
        | {
            "loader": None,
            "loader_kwargs": {},
            "name": NAME,
            "revision": revision,
            "experiment_kwargs": settings or None,
            "embed_dim": MULTIVECTOR_DIM if multivector else dim or meta.embed_dim,
            "similarity_fn_name": ScoringFunction.MAX_SIM if multivector else ScoringFunction.COSINE,
            "model_type": ["late-interaction" if multivector else "dense"],
            "framework": ["API"],
            "output_dtypes": None,  # the server's dtype is in its revision
            # mteb says cc-by-nc-4.0; the weights are under the Qwen Research License, for which it has no name.
            "license": None,
            "extra_requirements_groups": None,
        }
    )


def _ragged(embeddings: Any) -> list[NDArray[Any]]:
    """Give multi-vectors as mteb hands them back, a list or a tensor, as a list of (n_tokens, 128) arrays."""
    if hasattr(embeddings, "ndim") and embeddings.ndim == 2:
        embeddings = [embeddings]
    return [rows.numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows) for rows in embeddings]
