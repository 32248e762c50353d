"""autoglm-compress: a checkpoint folder goes in, a smaller one comes out, and a receipt says why it can be trusted.

The public functions are imported when they are first used, so that `import compress` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import distill, evaluate, inspect, load_receipt, measure_sensitivity, plan, prune, quantize, run
    from compress.machine import Machine
    from compress.plan import Plan
    from compress.recipe import Recipe
    from compress.run import Result
    from compress.sensitivity import Sensitivity, load_sensitivity
    from compress.signatures import Evaluation, Inspection, Receipt

    __version__: str

_PUBLIC = {
    "inspect": "compress.api",
    "plan": "compress.api",
    "run": "compress.api",
    "prune": "compress.api",
    "distill": "compress.api",
    "quantize": "compress.api",
    "evaluate": "compress.api",
    "load_receipt": "compress.api",
    "measure_sensitivity": "compress.api",
    "load_sensitivity": "compress.sensitivity",
    "Evaluation": "compress.signatures",
    "Inspection": "compress.signatures",
    "Machine": "compress.machine",
    "Plan": "compress.plan",
    "Receipt": "compress.signatures",
    "Recipe": "compress.recipe",
    "Result": "compress.run",
    "Sensitivity": "compress.sensitivity",
}

__all__ = [
    "Evaluation",
    "Inspection",
    "Machine",
    "Plan",
    "Receipt",
    "Recipe",
    "Result",
    "Sensitivity",
    "distill",
    "evaluate",
    "inspect",
    "load_receipt",
    "load_sensitivity",
    "measure_sensitivity",
    "plan",
    "prune",
    "quantize",
    "run",
]


class _Package(ModuleType):
    """Importing the module compress.run (.plan, .inspect) would put the module in the place of the public function of
    that name; here the function wins. The modules are reached by `from compress.run import ...`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from compress.receipt import own_version

        return own_version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
