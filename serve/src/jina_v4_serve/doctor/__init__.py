"""Reports on one screen what is wrong with this machine, the checkpoints or the settings, before a server is started.

`software`, `machine`, `checkpoints`, `settings` and `ports` check; `report` writes the results. Nothing is changed,
vLLM is not imported (that takes 20 s), and nothing outside of this machine is called.
"""

from jina_v4_serve.doctor.finding import Finding
from jina_v4_serve.doctor.report import as_json, as_text, examine

__all__ = ["Finding", "as_json", "as_text", "examine"]
