"""Fold the task adapters of jina-embeddings-v4 into stock checkpoints.

`fold` makes the checkpoints, `standin` a random-weight model in the published file layout; `cli` offers both.
Importing this package loads nothing heavy: torch comes in with the first command that needs it.
"""
