"""The tasks, their text prefixes and the image prompt: facts of the model that travel in every checkpoint.

The chat template renders the image prompt and nothing else. Any other chat would give vectors that the model was
never trained for, with status 200, so it raises instead.
"""

from enum import StrEnum


class Task(StrEnum):
    """The tasks the model was trained for."""

    RETRIEVAL = "retrieval"
    TEXT_MATCHING = "text-matching"
    CODE = "code"


TASKS = tuple(task.value for task in Task)

IMAGE_PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"

# Jinja runs with trim_blocks and lstrip_blocks, which remove newlines of the template, so the two of the prompt are
# inside a string literal. The loops are spelled `for message in messages` and `for part in message['content']` because
# vLLM reads the template's syntax tree to find out that contents are lists of parts.
CHAT_TEMPLATE = """\
{%- set allowed = 'This chat template renders one image and nothing else: exactly one user message whose content is \
a list of one image part and, optionally, one text part equal to "Describe the image." Send text as a plain input.' -%}
{%- set found = namespace(images=0, texts=0) -%}
{%- if messages | length != 1 or add_generation_prompt -%}
  {{- raise_exception(allowed) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] != 'user' -%}
    {{- raise_exception(allowed) -}}
  {%- endif -%}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' or part['type'] == 'image_url' -%}
      {%- set found.images = found.images + 1 -%}
    {%- elif part['type'] == 'text' and part['text'] == 'Describe the image.' -%}
      {%- set found.texts = found.texts + 1 -%}
    {%- else -%}
      {{- raise_exception(allowed) -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if found.images != 1 or found.texts > 1 -%}
  {{- raise_exception(allowed) -}}
{%- endif -%}
{{- '<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\\n' -}}
"""


def text_prefixes(task: str) -> dict[str, str]:
    """Return the prefix of each prompt name; text-matching is symmetric, so there both are queries."""
    passage = "Query: " if task == "text-matching" else "Passage: "
    return {"query": "Query: ", "passage": passage}
