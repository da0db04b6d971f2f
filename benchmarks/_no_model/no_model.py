"""A plugin of vLLM for `ceiling.py`: Qwen2.5-VL computes nothing, and the engine's stages are timed.

The model returns rows of ones of the right shapes. Whatever else vLLM and this project do stays as it is.
"""

import functools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STAGES = "CEILING_STAGES"  # the folder for the engine's times, a file a process
_WRITE_EVERY_S = 0.25
_spent_s: dict[str, float] = defaultdict(float)
_rows: list[torch.Tensor] = []


def register() -> None:
    """Take the arithmetic out of the model, and time the engine."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    Model.forward = _forward
    Model.embed_multimodal = _embed_multimodal
    Model.embed_input_ids = _embed_input_ids
    _time(Scheduler, "schedule", "schedule")
    _time(Scheduler, "update_from_output", "update")
    _time(GPUModelRunner, "execute_model", "execute")
    _time(GPUModelRunner, "_pool", "pool")
    threading.Thread(target=_write, daemon=True).start()


def _ones(n_rows: int, size: int) -> torch.Tensor:
    if not _rows or len(_rows[0]) < n_rows or _rows[0].shape[1] != size:
        _rows[:] = [torch.ones(max(n_rows, 4096), size)]
    return _rows[0][:n_rows]


def _forward(
    self: Any,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,  # noqa: ARG001 - vLLM's signature
    intermediate_tensors: object = None,  # noqa: ARG001 - vLLM's signature
    inputs_embeds: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    given = input_ids if inputs_embeds is None else inputs_embeds
    return _ones(len(given), self.config.text_config.hidden_size)


def _embed_input_ids(self: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return _ones(len(input_ids), self.config.text_config.hidden_size)


def _embed_multimodal(self: Any, *, image_grid_thw: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    merged = self.config.vision_config.spatial_merge_size**2
    sizes = (image_grid_thw.prod(-1) // merged).tolist()
    return [_ones(size, self.config.text_config.hidden_size) for size in sizes]


def _time(owner: type, name: str, stage: str) -> None:
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            _spent_s[stage] += time.thread_time() - begin  # stages within a stage are counted in both

    setattr(owner, name, timed)


def _write() -> None:
    path = Path(os.environ[STAGES]) / str(os.getpid())
    while True:
        time.sleep(_WRITE_EVERY_S)
        if _spent_s:  # no other process runs a stage
            written = path.with_name(f".{path.name}")
            written.write_text(json.dumps(dict(_spent_s)))
            written.replace(path)
