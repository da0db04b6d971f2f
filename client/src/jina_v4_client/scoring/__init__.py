"""Scores of vectors, and smaller vectors: numpy only, no server.

`similarity` has cosine, MaxSim, ranking and similarity maps, `quantization` int8 and binary vectors, `token_pooling`
multi-vectors with fewer rows; `rows` reads what callers pass.
"""

from jina_v4_client._model import image_grid
from jina_v4_client.scoring.similarity import Hit, Vectors, best, cosine, maxsim, rank, similarity_map

__all__ = ["Hit", "Vectors", "best", "cosine", "image_grid", "maxsim", "rank", "similarity_map"]
