"""Fold the task adapters of jina-embeddings-v4 into stock checkpoints.

`cli` has the commands. `fold` makes the checkpoints, with the maths of `lora` and `quantize`; `verify/`, `export/` and
`standin/` are the other commands. All use `reading/` (a base and its adapters) and `writing/` (folders, whole or not at
all). Importing this package loads nothing heavy: torch comes in with the first command that needs it.
"""
