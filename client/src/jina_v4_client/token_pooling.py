"""The public name of :mod:`jina_v4_client.scoring.token_pooling`."""

from jina_v4_client.scoring.token_pooling import pool_tokens

__all__ = ["pool_tokens"]
