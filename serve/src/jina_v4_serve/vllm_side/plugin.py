"""The entry point of vLLM's `vllm.general_plugins`: makes our model class known in every vLLM process."""

import os

from jina_v4_serve.phases import STARTED

ARCHITECTURE = "JinaEmbeddingsV4ForEmbedding"
# A key of the model's config, set by the launcher beside the architecture: task to the folder of its projector.
PROJECTORS = "jina_v4_projectors"


def register() -> None:
    """Register the model class; called again in each process, and more than once in some.

    Its name is one that no checkpoint carries: the launcher asks for it with `--hf-overrides`. A vLLM that serves
    another Qwen2.5-VL in the same environment gets no more than that name.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    if STARTED in os.environ:
        # Given a name alone, vLLM imports itself in another process to look at the class, which takes 8 s. It caches
        # what it saw by a hash of our module, so a newer vLLM would use what an older one saw.
        from jina_v4_serve.vllm_side.model import JinaEmbeddingsV4ForEmbedding

        ModelRegistry.register_model(ARCHITECTURE, JinaEmbeddingsV4ForEmbedding)
    else:
        ModelRegistry.register_model(ARCHITECTURE, f"jina_v4_serve.vllm_side.model:{ARCHITECTURE}")
