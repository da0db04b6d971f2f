"""What the published model fixes: tasks, dimensions, prefixes, the image prompt, how images are resized.

The same facts travel in every merged checkpoint; they are written here again because a client has no checkpoint.
"""

import math
from typing import Final, Literal, get_args

Task = Literal["retrieval", "text-matching", "code"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)
PromptName = Literal["query", "passage"]
PROMPT_NAMES: Final[tuple[PromptName, ...]] = get_args(PromptName)
Output = Literal["dense", "multivector"]
MODEL: Final = "jina-embeddings-v4"
TRUNCATE_DIMS: Final = (128, 256, 512, 1024, 2048)
MULTIVECTOR_DIM: Final = 128  # of each row
MAX_LENGTH: Final = 32768  # tokens, prefix included

# Tokens of the image prompt before <|vision_start|>, "<|im_start|>user\n", and after <|vision_end|>, "Describe the
# image.<|im_end|>\n".
IMAGE_FRAME: Final = (3, 6)

# The special tokens: any of them inside a text is parsed as one by a stock vLLM and changes what is embedded.
SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

MIN_PIXELS: Final = 3136
MAX_PIXELS: Final = 602112  # the published default: at most 768 tokens an image
MAX_ASPECT_RATIO: Final = 200
_PATCH: Final = 28  # pixels a side of one image token


def named_task(name: str) -> Task | None:
    """Give the task that a model's name or folder ends with."""
    return next((task for task in TASKS if name.rstrip("/").endswith(f"-{task}")), None)


def text_prefix(task: Task, prompt_name: PromptName | None) -> str:
    """Give what precedes every text: nothing for None; text-matching knows one side only."""
    if prompt_name is None:
        return ""
    return "Passage: " if prompt_name == "passage" and task != "text-matching" else "Query: "


def image_grid(width: int, height: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Give the rows and columns of patches into which the model cuts an image.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        max_pixels: what the image was embedded with.

    Returns:
        Rows and columns; each patch is 28 x 28 pixels of the resized image.

    Source: ``smart_resize`` of Qwen2-VL's image processor. Python's ``round`` (half to even) is part of it.
    """
    rows, columns = round(height / _PATCH), round(width / _PATCH)
    pixels = rows * columns * _PATCH**2
    if pixels > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / scale / _PATCH)) for side in (height, width))
    elif pixels < MIN_PIXELS:
        scale = math.sqrt(MIN_PIXELS / (height * width))
        rows, columns = (math.ceil(side * scale / _PATCH) for side in (height, width))
    return rows, columns


def count_image_tokens(width: int, height: int, max_pixels: int) -> int:
    """Count the image pads of an image of that many pixels."""
    rows, columns = image_grid(width, height, max_pixels)
    return rows * columns
