"""vLLM in-process: `LLM.encode` with our model class and the engine arguments of our launcher, and no HTTP."""

import io
from typing import Any

from _child import Vectors
from _data import PREFIX
from jina_v4_merge.prompts import IMAGE_PROMPT
from jina_v4_serve.pooling import PoolingRequest
from jina_v4_serve.vllm_side.model import pooling_params
from PIL import Image
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROJECTOR_DIM = 128
WANTED = {
    "dense": PoolingRequest(),
    "multivector": PoolingRequest(spans=(), multivector=True),
    "both": PoolingRequest(multivector=True),
}


class InProcess:
    """The engine, called from this process."""

    def __init__(self, arguments: list[str]) -> None:
        """Start it.

        Args:
            arguments: of vLLM's `serve`, as our launcher gives them; those of the server alone are left out.
        """
        parser = FlexibleArgumentParser(allow_abbrev=False)
        engine_parser = EngineArgs.add_cli_args(parser)
        parsed, _ = engine_parser.parse_known_args(["--model", *arguments])
        settings = vars(EngineArgs.from_cli_args(parsed))
        # `LLM` offers one pooling task; this one carries dense vectors as well, see `engine.wanted`.
        settings |= {"pooler_config": {"task": "token_embed"}, "disable_log_stats": True}
        self.llm = LLM(**settings)
        config = self.llm.llm_engine.vllm_config
        self.about = {"dtype": str(config.model_config.dtype).removeprefix("torch.")}

    def embed(self, kind: str, items: list[Any], output: str) -> Vectors:
        """Embed all items with one call, which is how it is fastest."""
        params = pooling_params(WANTED[output])
        if params.task == "embed":
            params.task, params.extra_kwargs = "token_embed", {"spans": None, "multivector": False}
        prompts: list[Any]
        if kind == "image":
            prompts = [{"prompt": IMAGE_PROMPT, "multi_modal_data": {"image": _open(item)}} for item in items]
        else:
            prompts = [PREFIX + item for item in items]
        outputs = self.llm.encode(prompts, params, pooling_task="token_embed", use_tqdm=False)
        vectors: Vectors = {name: [] for name in ("dense", "multivector") if output in (name, "both")}
        for done in outputs:
            values = done.outputs.data.float().numpy()  # dense vector, then rows
            n_rows = len(done.prompt_token_ids) * PROJECTOR_DIM if "multivector" in vectors else 0
            if "dense" in vectors:
                vectors["dense"].append(values[: len(values) - n_rows])  # (hidden,)
            if n_rows:
                vectors["multivector"].append(values[-n_rows:].reshape(-1, PROJECTOR_DIM))  # (n_tokens, 128)
        return vectors


def _open(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")
