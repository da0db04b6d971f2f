"""The entry point of vLLM's `vllm.general_plugins`: makes our model class known in every vLLM process."""

ARCHITECTURE = "JinaEmbeddingsV4ForEmbedding"
# A key of the model's config, set by the launcher beside the architecture: task to the folder of its projector.
PROJECTORS = "jina_v4_projectors"


def register() -> None:
    """Register the model class by name; called again in each process, and more than once in some.

    The name is one that no checkpoint carries: the launcher asks for it with `--hf-overrides`. A vLLM that serves
    another Qwen2.5-VL in the same environment is left alone.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"jina_v4_serve.vllm_side.model:{ARCHITECTURE}")
