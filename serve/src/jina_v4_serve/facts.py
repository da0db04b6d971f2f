"""Facts of the model and of this deployment that several rooms need, each written once.

What a checkpoint carries (prompts, dimensions, image sizes) is read from the checkpoint and is not here.
"""

MODEL = "jina-embeddings-v4"
# Each task, and what a request's `task` may be for it.
TASK_VALUES = {
    "retrieval": ("retrieval", "retrieval.query", "retrieval.passage"),
    "text-matching": ("text-matching",),
    "code": ("code", "code.query", "code.passage"),
}
TASKS = tuple(TASK_VALUES)
PROMPT_NAMES = ("query", "passage")
PORTS = {task: 8001 + i for i, task in enumerate(TASKS)}
GATEWAY_PORT = 8000

MAX_MODEL_LEN = 32768  # tokens; the published model's ceiling
PROJECTOR_DIM = 128  # of a multi-vector's rows
PIXELS_PER_TOKEN = 28 * 28  # sides are multiples of 28 pixels
IMAGE_PROMPT_TOKENS = 11  # beside the image's own


def model_name(task: str) -> str:
    """Return the name of one task's model, which is also the name of its checkpoint's folder."""
    return f"{MODEL}-{task}"
