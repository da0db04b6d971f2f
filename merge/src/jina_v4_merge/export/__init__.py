"""What the export commands write: `adapters` for PEFT and vLLM, `gguf` for llama.cpp.

`gguf_file` and `gguf_tokenizer` know the format of GGUF files; the package gguf is an extra.
"""
