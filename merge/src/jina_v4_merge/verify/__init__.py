"""What `verify` does, a step a module.

`checks` checks checkpoints by themselves, with `scan` (every byte and value), `exports` (adapters, GGUF) and `canary`.
`refold` is `--base`; `against` and `settings` are `--against`; `reference` computes the vectors of `--canary`.
"""
