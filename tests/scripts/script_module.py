"""A program of scripts/ as a module, for its tests."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def import_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
