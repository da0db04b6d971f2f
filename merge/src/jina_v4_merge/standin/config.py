"""The configs of stand-in models: the keys of the published files, in two sizes.

`full` has the published sizes throughout. `tiny` keeps what vectors and serving depend on, hidden size, heads, LoRA
rank and Matryoshka dimensions, and shrinks the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jina_v4_merge.prompts import TASKS

HIDDEN_SIZE = 2048
DIMENSIONS = [128, 256, 512, 1024, 2048]
PROJECTOR_DIM = 128
RANK = 32

_MODULES = "(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)"
_PROJECTORS = "(single_vector_projector|multi_vector_projector)"


@dataclass(frozen=True)
class Size:
    """What differs between the sizes."""

    n_layers: int
    mlp: int
    vocabulary: int
    vision_depth: int
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    full_attention_blocks: tuple[int, ...]


SIZES = {
    "tiny": Size(2, 512, 1024, 2, 160, 320, 2, (1,)),
    "full": Size(36, 11008, 151936, 32, 1280, 3420, 16, (7, 15, 23, 31)),
}


def model_config(size: str, seed: int, ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json of a stand-in; `ids` has the ids of the special tokens."""
    sizes = SIZES[size]
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": sizes.n_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocabulary,
    }
    vision = {
        "depth": sizes.vision_depth,
        "fullatt_block_indexes": list(sizes.full_attention_blocks),
        "hidden_act": "silu",
        "hidden_size": sizes.vision_hidden,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "intermediate_size": sizes.vision_mlp,
        "model_type": "qwen2_5_vl",
        "num_heads": sizes.vision_heads,
        "out_hidden_size": HIDDEN_SIZE,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "torch_dtype": "bfloat16",
        "window_size": 112,
    }
    return {
        "architectures": ["JinaEmbeddingsV4Model"],
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v4.JinaEmbeddingsV4Config",
            "AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model",
        },
        **text,
        "_attn_implementation": "sdpa",
        "image_token_id": ids["<|image_pad|>"],
        "matryoshka_dims": DIMENSIONS,
        "model_type": "qwen2_5_vl",
        "multi_vector_projector_dim": PROJECTOR_DIM,
        "single_vector_pool_strategy": "mean",
        "sliding_window": 32768,
        "standin": {"seed": seed, "size": size},
        "task_names": list(TASKS),
        "text_config": {**text, "image_token_id": None, "model_type": "qwen2_5_vl_text", "sliding_window": None},
        "transformers_version": "4.52.0",
        "truncate_dim": None,
        "verbosity": 0,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
    }


def adapter_config() -> dict[str, Any]:
    """Return the adapters/adapter_config.json of a stand-in."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "jinaai/jina-embeddings-v4",
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": ".*visual.*",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": RANK,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": f"(.*(model).*{_MODULES}.*$|.*{_PROJECTORS}.*$)",
        "task_type": "FEATURE_EXTRACTION",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    }


def preprocessor_config() -> dict[str, Any]:
    """Return the preprocessor_config.json, which no size changes."""
    return {
        "auto_map": {"AutoProcessor": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Processor"},
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 602112,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "JinaEmbeddingsV4Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 602112, "shortest_edge": 3136},
        "temporal_patch_size": 2,
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
