"""Have torch say of this processor what ATEN_CPU_CAPABILITY says, so that vLLM loads its library for such a one.

Python imports this by itself where the folder is in PYTHONPATH, in a server and its engine too: see `processors.py`.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HIDDEN = {"avx2": ("avx512", "amx"), "avx512": ("avx512_bf16", "avx512_fp16", "amx")}[os.environ["ATEN_CPU_CAPABILITY"]]


class Disguise(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_disguised(module: ModuleType) -> None:
            load(module)
            actual = module.get_capabilities()
            disguised = actual | {word: False for word in actual if word.startswith(HIDDEN)}
            module.get_capabilities = lambda: disguised

        spec.loader.exec_module = load_disguised
        return spec


sys.meta_path.insert(0, Disguise())
