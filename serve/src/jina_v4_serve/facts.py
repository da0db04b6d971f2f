"""Facts of the model and of this deployment that several packages need.

Prompts, dimensions and image sizes are not here: they are read from the checkpoint.
"""

MODEL = "jina-embeddings-v4"
# The values of a request's `task`, by task.
TASK_VALUES = {
    "retrieval": ("retrieval", "retrieval.query", "retrieval.passage"),
    "text-matching": ("text-matching",),
    "code": ("code", "code.query", "code.passage"),
}
TASKS = tuple(TASK_VALUES)
PROMPT_NAMES = ("query", "passage")
PORTS = {task: 8001 + i for i, task in enumerate(TASKS)}
GATEWAY_PORT = 8000

MAX_MODEL_LEN = 32768  # tokens; the published model's limit
PROJECTOR_DIM = 128  # numbers in a row of a multi-vector
PIXELS_PER_TOKEN = 28 * 28  # of an image, whose sides are scaled to multiples of 28
IMAGE_PROMPT_TOKENS = 11  # the tokens of an image prompt besides the image's own


def model_name(task: str) -> str:
    """Return the name of one task's model, which is also the name of its checkpoint's folder."""
    return f"{MODEL}-{task}"
