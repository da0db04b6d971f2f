"""The stand-in: a model with random weights in the published file layout (`weights`, `config`, `tokenizer`)."""
