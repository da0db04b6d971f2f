"""Serve jina-embeddings-v4 with vLLM: a launcher, and a model plugin that pools in the engine.

This module imports nothing heavy: every process of vLLM loads it to find the plugin.
"""

__version__ = "0.2.0"
