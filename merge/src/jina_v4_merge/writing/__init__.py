"""Writing: folders that appear whole or not at all, and what a checkpoint holds.

`staging` makes the folders and `filesystem` knows what can be done where they are; `shards` writes tensors some rows at
a time, `checkpoint` makes the small files, `manifest` says what a folder is and what it was made from.
"""
