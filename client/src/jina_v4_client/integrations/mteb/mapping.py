"""Which adapter and which prompt a task of MTEB gets; docs/evaluation.md has it as a table.

mteb's own wrapper of the published model is the measure where figures are compared: retrieval with query and passage,
STS and pair classification with text-matching, whatever is about programming with code. What it does not name it
embeds as retrieval queries; here symmetric tasks get text-matching and documents the passage prompt, as the model was
trained.
"""

from enum import Enum
from typing import TYPE_CHECKING, Final

from jina_v4_client._model import PromptName, Task
from jina_v4_client.errors import ArgumentError

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

# Documents are ranked for queries; the only types that MaxSim can score.
RANKED: Final = frozenset(
    {
        "Any2AnyMultilingualRetrieval",
        "Any2AnyReranking",
        "Any2AnyRetrieval",
        "DocumentUnderstanding",
        "InstructionReranking",
        "InstructionRetrieval",
        "Reranking",
        "Retrieval",
        "VisionCentricQA",
    }
)
# Images are matched with captions or labels: things of two kinds, which text-matching was not made for.
CROSS_MODAL: Final = frozenset({"Compositionality", "ZeroShotClassification"})
SYMMETRIC: Final = frozenset(
    {
        "BitextMining",
        "Classification",
        "Clustering",
        "ImageClassification",
        "ImageClustering",
        "MultilabelClassification",
        "PairClassification",
        "Regression",
        "STS",
        "Summarization",
        "VisualSTS(eng)",
        "VisualSTS(multi)",
    }
)


def task_for(metadata: "TaskMetadata") -> Task:
    """Choose the adapter for a task of MTEB.

    Raises:
        ArgumentError: a type of task that this model is not for.
    """
    if metadata.type not in RANKED | CROSS_MODAL | SYMMETRIC:
        raise ArgumentError(
            f"{metadata.name} is of type {metadata.type}, which the model is not for; it is for"
            f" {', '.join(sorted(RANKED | CROSS_MODAL | SYMMETRIC))}"
        )
    if is_programming(metadata):
        return "code"
    return "text-matching" if metadata.type in SYMMETRIC else "retrieval"


def prompt_name_for(prompt_type: Enum | None) -> PromptName:
    """Choose the prompt for a side of a task; None, of a task without sides, is query.

    With text-matching it is of no concern: the model knows one prompt there.
    """
    return "passage" if prompt_type is not None and prompt_type.value == "document" else "query"


def is_programming(metadata: "TaskMetadata") -> bool:
    """Tell whether a task is about programming: of that domain, or in a programming language."""
    return "Programming" in (metadata.domains or ()) or any(code.endswith("-Code") for code in metadata.bcp47_codes)
