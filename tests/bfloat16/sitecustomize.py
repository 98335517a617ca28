"""PYTHONPATH=tests/bfloat16: every process that is started takes its processor for one that multiplies in bfloat16."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class Telling(MetaPathFinder):
    """Tells torch.cpu so when it is imported, and imports nothing by itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torch.cpu" else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def told(module: ModuleType) -> None:
                run(module)
                module._is_amx_tile_supported = lambda: True  # type: ignore[attr-defined]

            spec.loader.exec_module = told  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Telling())
