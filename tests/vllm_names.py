"""Whether a vLLM has all that this project uses of it, by its sources alone: `python tests/vllm_names.py FOLDER`.

FOLDER is the package `vllm`, as an unpacked wheel holds it. Nothing of it is imported, so it need not be installed.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "serve/src/jina_v4_serve"
# Modules that run with the versions of `versions.REPLACEMENTS` alone.
BOUND = ("cpu_kernels", "cpu_products", "cpu_lora", "scheduler")
# What is used of objects that vLLM hands over, by module and class.
ATTRIBUTES = {
    "v1.pool.metadata:PoolingCursor": "prompt_lens_cpu seq_lens_cpu num_scheduled_tokens_cpu",
    "v1.pool.metadata:PoolingMetadata": "get_pooling_cursor get_prompt_token_ids_cpu pooling_states pooling_params",
    "pooling_params:PoolingParams": "task dimensions extra_kwargs requires_token_ids",
    "model_executor.layers.pooler.common:PoolingParamsUpdate": "apply",
    "renderers.base:BaseRenderer": "render_cmpl render_cmpl_async get_tokenizer",
    "engine.protocol:EngineClient": "encode errored renderer model_config vllm_config",
    "plugins.endpoint_plugins.interface:EndpointPlugin": "name required_tasks attach_router init_state",
    "entrypoints.openai.models.serving:OpenAIServingModels": "base_model_paths lora_requests",
    "entrypoints.cli.serve:ServeSubcommand": "cmd",
    "config.model:ModelConfig": (
        "dtype max_model_len quantization multimodal_config matryoshka_dimensions hf_config model"
    ),
    "config.multimodal:MultiModalConfig": "mm_processor_kwargs",
    "config.scheduler:SchedulerConfig": "max_num_batched_tokens long_prefill_token_threshold",
    "config.cache:CacheConfig": "cache_dtype enable_prefix_caching",
    "config.device:DeviceConfig": "device_type",
    "config.parallel:ParallelConfig": (
        "data_parallel_size data_parallel_size_local data_parallel_external_lb data_parallel_hybrid_lb"
    ),
    "config.vllm:VllmConfig": "model_config cache_config scheduler_config parallel_config device_config lora_config",
}
PARAMETERS = {
    "engine.protocol:EngineClient.encode": "prompt pooling_params request_id lora_request trace_headers priority"
}


def missing(vllm: Path) -> list[str]:
    """Return what a vLLM lacks.

    Args:
        vllm: the folder of the package.
    """
    return [*_imports(vllm), *_moved(vllm), *_attributes(vllm), *_options(vllm)]


def _tree(vllm: Path, module: str) -> ast.Module | None:
    path = vllm.joinpath(*module.split("."))
    for each in (path.with_suffix(".py"), path / "__init__.py"):
        if each.is_file():
            return ast.parse(each.read_text())
    return None


def _has(vllm: Path, module: str, name: str) -> bool:
    """Tell whether a name can be imported from a module, also where it is handed on from another."""
    tree = _tree(vllm, module)
    if tree is None:
        return False
    is_package = vllm.joinpath(*module.split("."), "__init__.py").is_file()
    if is_package and _tree(vllm, f"{module}.{name}" if module else name) is not None:
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return True
            if any(alias.name == "*" for alias in node.names) and _has(vllm, f"{module}.{node.module}", name):
                return True
        if isinstance(node, ast.Constant) and node.value == name:  # a module that imports when it is asked
            return True
    return False


def _imports(vllm: Path) -> Iterator[str]:
    for path in sorted((PACKAGE / "vllm_side").glob("*.py")):
        if path.stem in BOUND:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                module = (node.module or "").partition(".")[2]
                yield from (
                    f"{path.name}: {node.module}.{alias.name}"
                    for alias in node.names
                    if not _has(vllm, module, alias.name)
                )


def _moved(vllm: Path) -> Iterator[str]:
    from jina_v4_serve.vllm_side.versions import MOVED

    for name, places in MOVED.items():
        if not any(_has(vllm, place.partition(".")[2], name) for place in places):
            yield f"versions.py: {name}"


def _attributes(vllm: Path) -> Iterator[str]:
    for place, names in ATTRIBUTES.items():
        module, _, class_name = place.partition(":")
        found = _class(vllm, module, class_name)
        owned = {
            *(node.name for node in ast.walk(found) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)),
            *(node.id for node in ast.walk(found) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
            *(node.attr for node in ast.walk(found) if isinstance(node, ast.Attribute)),
        }
        yield from (f"{place}.{name}" for name in names.split() if name not in owned)
    for place, names in PARAMETERS.items():
        module, _, method = place.partition(":")
        class_name, _, name = method.partition(".")
        for node in ast.walk(_class(vllm, module, class_name)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                taken = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                yield from (f"{place}({each}=)" for each in names.split() if each not in taken)


def _class(vllm: Path, module: str, name: str) -> ast.AST:
    tree = _tree(vllm, module) or ast.Module([], [])
    return next(
        (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name), ast.Module([], [])
    )


def _options(vllm: Path) -> Iterator[str]:
    """Yield the options that the launcher writes and no parser of vLLM's takes."""
    sources = (PACKAGE / "launch/arguments.py").read_text()
    known = set()
    for path in [vllm / "engine/arg_utils.py", *(vllm / "entrypoints").rglob("cli_args.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                known.add(node.value.removeprefix("--").replace("-", "_"))
    for option in sorted(set(re.findall(r"""["']--([a-z0-9-]+)""", sources))):
        name = option.replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            yield f"arguments.py: --{option}"


if __name__ == "__main__":
    found = missing(Path(sys.argv[1]))
    sys.exit("\n".join(found) or None)
