"""Environment variables that would change the vectors but not the revision. A server does not start with them."""

from collections.abc import Iterator, Mapping

from jina_v4_serve.errors import OptionError

_COARSER = "float32 would be multiplied in a coarser type"
_ROUNDED = "numbers would be rounded more coarsely"
# The harmless value of each variable, and the effect of others. oneDNN multiplies on a CPU; its old name was DNNL.
FIXED_VARIABLES = {
    "VLLM_FLOAT32_MATMUL_PRECISION": ("highest", _COARSER),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("strict", _COARSER),
    "DNNL_DEFAULT_FPMATH_MODE": ("strict", _COARSER),
    "VLLM_MARLIN_INPUT_DTYPE": ("", _ROUNDED),
    "VLLM_HUMMING_INPUT_QUANT_CONFIG": ("", _ROUNDED),
    "VLLM_HUMMING_ONLINE_QUANT_CONFIG": ("", _ROUNDED),
    "VLLM_HUMMING_USE_F16_ACCUM": ("0", _ROUNDED),
    "VLLM_MODEL_REDIRECT_PATH": ("", "another folder would be served instead of the checkpoint"),
    "VLLM_USE_RUST_FRONTEND": ("0", "another program would answer, without our routes and prompts"),
}


def harmful(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each variable that is set to a harmful value, and its effect."""
    for name, (harmless, effect) in FIXED_VARIABLES.items():
        if environment.get(name, "").strip().lower() not in ("", "0", harmless):
            yield name, effect


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables that would change the vectors.

    Raises:
        OptionError: the message names the first one and its effect.
    """
    for name, effect in harmful(environment):
        raise OptionError(f"{name}={environment[name]} cannot be served: {effect}. Unset it")
