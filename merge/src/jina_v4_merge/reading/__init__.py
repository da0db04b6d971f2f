"""Reading: a base and its adapters, of which every tensor is accounted for before anything is written.

`sources` finds them here or on the hub, `configs` reads what they say of themselves, `adapter_config` and `adapters`
read the LoRA adapters, `weights` reads tensors some rows at a time, `layout` knows which tensors there must be. `model`
puts them together. `verify` reads checkpoints with the same modules.
"""
