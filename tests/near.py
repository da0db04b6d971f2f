"""How far vectors are from those that are expected."""

import math
from collections.abc import Iterable
from typing import Any


def largest_difference(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """Return the largest difference of any element of pairs of arrays or tensors of floats; infinite where one is NaN.

    Python's max() passes over a NaN, and NumPy stretches one shape to another: either would hide wrong vectors.
    """
    pairs = list(zip(found, expected, strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    differences = [float(abs(a - b).max()) for a, b in pairs]
    return max(math.inf if math.isnan(difference) else difference for difference in differences)
