"""Making the checkpoints: one pass over the base folds all tasks.

Everything that can be wrong with the inputs' layout is found from headers and configs, before anything is written.
What no adapter touches is written once and hard-linked into the other checkpoints. In memory there are a few blocks of
rows of base tensors, their folded forms, and the A and B that belong to them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jina_v4_merge import checkpoint, provenance
from jina_v4_merge.checkpoint import MANIFEST_NAME
from jina_v4_merge.digests import FileDigest, hashing, write_file
from jina_v4_merge.errors import OutputError, named
from jina_v4_merge.exchange import can_exchange
from jina_v4_merge.folded_weights import FoldedWeights
from jina_v4_merge.model import Model, open_model
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.provenance import require_replaceable
from jina_v4_merge.shards import DTYPES, MAX_SHARD_BYTES
from jina_v4_merge.space import can_link, require_space
from jina_v4_merge.staging import publish, require_absent, staging


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was made."""

    task: str
    folder: Path
    n_bytes: int


def fold(
    base: str,
    out: Path,
    tasks: Sequence[str] = TASKS,
    dtype: str = "bfloat16",
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    adapters: str | None = None,
    adapters_revision: str | None = None,
    quantized: str | None = None,
    force: bool = False,
) -> list[Checkpoint]:
    """Fold the adapters of some tasks into a base, and write a checkpoint for each.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder in which the checkpoints' folders are made.
        tasks: Which of the base's tasks to fold.
        dtype: Of the weights written: bfloat16, float16 or float32.
        revision: Of a base on the hub.
        max_shard_bytes: Weights go on in another file above this.
        adapters: A folder, or the name of a model on the hub, of adapters that do not lie beside the base.
        adapters_revision: Of adapters on the hub.
        quantized: What the language model's matrices are written as instead of `dtype`: int8 or fp8.
        force: Replace checkpoints that are there already, each when its successor is whole.

    Returns:
        What was made, in the order of `tasks`.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    folders = {task: f"{checkpoint.MODEL}-{task}" for task in tasks}
    targets = [out / name for name in folders.values()]
    if force:
        for target in targets:
            require_replaceable(target)
    else:
        require_absent(targets, ", replace it with --force")
    model = open_model(base, revision, adapters, adapters_revision)
    model.require_tasks(folders)
    plain_files = {
        task: checkpoint.plain_files(model.small_files, model.config, task, dtype, quantized) for task in folders
    }
    weights = FoldedWeights(model, DTYPES[dtype], max_shard_bytes, quantized)
    with staging(out) as stage:
        links = can_link(stage)
        make_manifest = partial(provenance.manifest, model, dtype=dtype, quantized=quantized)
        require_space(out, _sizes(model, weights, plain_files, make_manifest, links))
        if force and any(map(Path.exists, targets)) and not can_exchange(stage):
            raise OutputError(
                f"{out}: folders cannot be replaced in one step on this file system; "
                f"remove {named([str(target) for target in targets if target.exists()])} or choose another place"
            )
        staged = {task: stage / name for task, name in folders.items()}
        for folder in staged.values():
            folder.mkdir()
        with hashing(model.files) as source_digests:
            files = weights.write(staged, links)
            digests = source_digests()
        for task, folder in staged.items():
            files[task] |= {name: write_file(folder / name, content) for name, content in plain_files[task].items()}
            write_file(folder / MANIFEST_NAME, make_manifest(task, files=files[task], source_digests=digests))
        model.require_unchanged()
        publish(list(staged.values()), out, require_replaceable if force else None)
    return [
        Checkpoint(task, out / name, sum(file.stat().st_size for file in (out / name).iterdir()))
        for task, name in folders.items()
    ]


def _sizes(
    model: Model,
    weights: FoldedWeights,
    plain_files: Mapping[str, Mapping[str, bytes]],
    make_manifest: Callable[..., bytes],
    links: bool,
) -> list[int]:
    """Return the size of each file and folder that is going to be written, one that is hard-linked only once."""
    read = {path: FileDigest("0" * 64, path.stat().st_size) for path in model.files}
    sizes: list[int] = []
    for task, plain in plain_files.items():
        own = weights.sizes() | {name: len(content) for name, content in plain.items()}
        digests = {name: FileDigest("0" * 64, size) for name, size in own.items()}
        manifest = make_manifest(task, files=digests, source_digests=read)  # as long as the true one
        if links and sizes:
            for name, _ in weights.common:
                del own[name]
        sizes += [1, len(manifest), *own.values()]  # a folder takes one block
    return sizes
