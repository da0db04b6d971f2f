"""Fields of other servers. If a field would change vectors there, it is refused, unless its value changes nothing here.

Sources: vLLM's `entrypoints/pooling` (0.32); the API references of text-embeddings-inference, llama.cpp, Ollama,
SGLang, Cohere, Voyage, Mistral, Gemini, Nomic, Mixedbread, Fireworks, DeepInfra; the hosted service of the model's
maker, which ignores `normalized`. docs/serve.md lists all of them. Unknown fields are ignored, as by that service, and
listed in a header of the reply.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jina_v4_serve.api.errors import invalid, shorten
from jina_v4_serve.api.forms.schema import Body, EmbeddingsBody


@dataclass(frozen=True)
class Foreign:
    """A field that this server does not have.

    Attributes:
        advice: what this server does, or what to send instead.
        same: the values that change nothing here.
    """

    advice: str
    same: tuple[object, ...] = ()


_UNIT = "dense vectors always have unit length"
_MEAN = "dense vectors are the mean over the tokens"
_END = "texts are cut at their end"
_CUT = "send truncate or max_length"
_PROMPTS = (
    "instruction", "custom_instruction", "instruct", "query_instruction", "prefix", "prompt_type", "prompt",
    "prompt_template",
)  # fmt: skip
_CHAT = "texts always get their prefix, and images the published prompt"

FOREIGN: Mapping[str, Foreign] = {
    **dict.fromkeys(
        ("normalized", "normalize", "normalize_embeddings", "use_activation", "activation"), Foreign(_UNIT, (True,))
    ),
    "embd_normalize": Foreign(_UNIT, (2,)),
    "softmax": Foreign(_UNIT, (False,)),
    "pooling": Foreign(_MEAN, ("mean",)),
    "pooling_type": Foreign(_MEAN, ("mean", "MEAN")),
    "truncation_side": Foreign(_END, ("right",)),
    "truncation_direction": Foreign(_END, ("right", "Right")),
    "truncation_strategy": Foreign(_CUT, ("none",)),
    "long_text_mode": Foreign(_CUT),
    "max_tokens": Foreign("send max_length"),
    "padding": Foreign("texts are never padded", ("do_not_pad", False)),
    **dict.fromkeys(
        _PROMPTS,
        Foreign("the model has two prefixes; send prompt_name: query, passage, or none if the texts have your own"),
    ),
    **dict.fromkeys(("dimension", "dimensionality"), Foreign("send dimensions")),
    "embed_dtype": Foreign("numbers are float32; Accept: application/x-safetensors; dtype=float16", ("float32",)),
    "endianness": Foreign("base64 has little-endian numbers", ("little", "native")),
    "return_logits": Foreign("only vectors are returned", (False, [])),
    "mm_processor_kwargs": Foreign("send max_pixels", ({},)),
    "media_io_kwargs": Foreign("images are read as in the published code", ({},)),
    "options": Foreign("send max_length for num_ctx; the others have no effect on vectors", ({},)),
    "lora_path": Foreign("send task"),
    "chat_template": Foreign(_CHAT),
    "chat_template_kwargs": Foreign(_CHAT, ({},)),
    "add_generation_prompt": Foreign(_CHAT, (False,)),
    **dict.fromkeys(("inputs", "images"), Foreign("send input")),
    **dict.fromkeys(
        ("text", "image", "pdf"),
        Foreign('send it as an item of input: {"text": ...}, {"image": ...} or {"pdf": ...}'),
    ),
    **dict.fromkeys(
        ("query", "queries", "documents"),
        Foreign("it is for rankings, at /v1/rerank or /v1/score; send input"),
    ),
}

# The vectors are the same for all values of these: the tokenizer adds no special tokens, nothing is cached, and the
# last message of a chat is the user's or empty, so there is nothing to continue.
HARMLESS = {
    "add_special_tokens", "cache_salt", "continue_final_message", "keep_alive", "metadata", "request_id", "rid",
    "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip


def check_foreign(request: Body, route: str) -> list[str]:
    """Check the fields of a request that its form does not have.

    Returns:
        The names of unknown fields, which are ignored.

    Raises:
        ApiError: 422 for a field of /v1/embeddings, or one that would change the vectors of another server.
    """
    sent = {name: value for name, value in (request.model_extra or {}).items() if value is not None}
    for name in sorted(sent.keys() & EmbeddingsBody.model_fields.keys()):
        raise invalid(name, f"{name} is a field of /v1/embeddings and not of {route}")
    for name, value in sent.items():
        foreign = FOREIGN.get(name)
        if foreign is not None and value not in foreign.same:
            raise invalid(name, f"{name}={shorten(value)} is not offered here: {foreign.advice}", value)
    return [name for name in sent if name not in FOREIGN and name not in HARMLESS]
