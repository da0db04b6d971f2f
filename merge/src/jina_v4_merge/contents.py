"""Saying what a file holds instead of what its name promises, and which pickles lie where safetensors are wanted."""

import re
from pathlib import Path

HEAD_BYTES = 64  # enough for `instead`

_POINTER = b"version https://git-lfs"
_PICKLE = re.compile(r"(adapter_model|consolidated|model|pytorch_model)\b.*\.(bin|ckpt|pt|pth)")
_CONVERT = (
    "only safetensors are read, since loading a pickle runs the code in it. If you trust the file, convert it: load it "
    "with torch.load(FILE, weights_only=True) and write it with safetensors.torch.save_file"
)


def instead(head: bytes) -> str | None:
    """Return what a file is instead of what was expected, and what to do; None where it is nothing known.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of it.
    """
    if head.startswith(_POINTER):
        return (
            "a Git LFS pointer and not the file itself; fetch the file with `git lfs pull` in its repository, or with "
            "`hf download`"
        )
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return f"a pickle of PyTorch; {_CONVERT}"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "a web page and not the file itself; fetch the file anew, for instance with `hf download`"
    return None


def pickles(folder: Path) -> str:
    """Return a sentence on the pickled weights in a folder, after a space; nothing where there are none."""
    names = sorted(path.name for path in folder.glob("*") if _PICKLE.fullmatch(path.name))
    return f" {names[0]} is there, which is a pickle: {_CONVERT}" if names else ""
