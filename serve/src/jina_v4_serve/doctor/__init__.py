"""One screen that says what is wrong with this machine, checkpoints or settings, before anything is started.

`software`, `machine`, `checkpoints`, `settings` and `ports` check; `report` writes what they found. Nothing is changed,
no vLLM is imported (that takes 20 s), nothing outside this machine is called.
"""

from jina_v4_serve.doctor.finding import Finding
from jina_v4_serve.doctor.report import as_json, as_text, examine

__all__ = ["Finding", "as_json", "as_text", "examine"]
