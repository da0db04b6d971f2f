"""Serve jina-embeddings-v4 with vLLM: a launcher, and a model plugin that pools in the engine.

Nothing heavy is imported here: vLLM loads this package in every one of its processes to find the plugin.
"""

__version__ = "0.2.0"
