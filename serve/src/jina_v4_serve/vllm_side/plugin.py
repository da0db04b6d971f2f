"""The entry point of vLLM's `vllm.general_plugins`: registers our model class in every vLLM process."""

import os

from jina_v4_serve.phases import STARTED

ARCHITECTURE = "JinaEmbeddingsV4ForEmbedding"
# A key of the model's config, which the launcher sets for several tasks: the folder of each task's projector.
PROJECTORS = "jina_v4_projectors"


def register() -> None:
    """Register the model class. vLLM calls this in each process, in some more than once.

    No checkpoint has its name; the launcher selects it with `--hf-overrides`. A vLLM that serves another Qwen2.5-VL in
    the same environment is not affected.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    if STARTED in os.environ:
        # With the name only, vLLM imports itself in another process to inspect the class, which takes 8 s. It caches
        # the result by a hash of our module, so a newer vLLM would use the result of an older one.
        from jina_v4_serve.vllm_side.model import JinaEmbeddingsV4ForEmbedding

        ModelRegistry.register_model(ARCHITECTURE, JinaEmbeddingsV4ForEmbedding)
    else:
        ModelRegistry.register_model(ARCHITECTURE, f"jina_v4_serve.vllm_side.model:{ARCHITECTURE}")
