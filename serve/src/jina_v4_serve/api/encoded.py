"""Base64 in all forms that programs write: in lines, without padding, in the URL-safe alphabet, percent-escaped.

The client reads data URIs by the same rule (`jina_v4_client._images`).
"""

import base64
import re
from urllib.parse import unquote

_STANDARD = str.maketrans("-_", "+/")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/_-]")


def read_base64(text: str) -> bytes:
    """Decode base64; white space, %-escapes, either alphabet and missing padding are accepted.

    Raises:
        ValueError: the text is not base64; the message names the first wrong character.
    """
    digits = "".join(unquote(text).split()).rstrip("=")
    wrong = _NOT_BASE64.search(digits)
    if wrong is not None:
        raise ValueError(f"character {wrong.start() + 1} (white space not counted) is {wrong[0]!a}")
    if len(digits) % 4 == 1:
        raise ValueError(f"its end is missing: {len(digits)} characters without padding are never whole bytes")
    return base64.b64decode(digits.translate(_STANDARD) + "=" * (-len(digits) % 4))
