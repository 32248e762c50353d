"""A GPU that is none: tensors that say they are on one and compute on the CPU, and refuse to meet tensors elsewhere.

    python -m tests.fake_gpu

The command line in a process where torch has it: a line of JSON in, [free bytes, arguments], and one out, [exit code,
stdout, stderr, matrix products on the GPU]. It shows that everything is moved there, and back, where it must be; not
that a real one computes the same.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from compress import device
from compress.cli import main

ANY_DEVICE = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index"}  # as torch itself allows


class OnGpu(torch.Tensor):
    """A tensor that says it lies on the GPU; `inner` is where it does."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="fakegpu:0",
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"

    def tolist(self) -> Any:
        """As a tensor on a GPU, which torch copies from there; it refuses to do so for subclasses."""
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    """Also sees what makes new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = computed(func, args, kwargs or {})
        products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")
        self.products += func._schema.name in products and isinstance(result, OnGpu)
        return result


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation on the tensors inside; RuntimeError when they are on two devices, as torch says it."""
    name = func._schema.name
    if name == "aten::_fused_sdp_choice":
        return 0  # plain products: the fused kernels of a real GPU are not here
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    here = [value for value in tensors if isinstance(value, OnGpu)]
    elsewhere = [value for value in tensors if not isinstance(value, OnGpu) and value.dim()]
    if here and elsewhere and name not in ANY_DEVICE:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found fakegpu:0 and cpu")
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else "fakegpu" if _leads(name, args, here) else "cpu"
    if asked is not None and target == "fakegpu":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if (name.endswith("_") and not name.endswith("__")) or name in ("aten::copy_",):
        return args[0]  # in place: the same tensor as before
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(OnGpu, result, is_leaf=_plain) if target == "fakegpu" and _some(result) else result


def _leads(name: str, args: Any, here: list[OnGpu]) -> bool:
    return isinstance(args[0], OnGpu) if name in ANY_DEVICE else bool(here)


def _inside(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _some(result: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in tree_flatten(result)[0])


def present() -> None:
    """Make torch say, in this process, that there is a CUDA device. Under the mode `_Gpu` it computes."""
    _setup_privateuseone_for_python_backend("fakegpu")
    device.FIRST = "fakegpu:0"
    device.DRIVERS = (Path("/"),)
    device._missing = lambda: None  # type: ignore[assignment]  # not torch's own answer: other libraries ask it too
    said: dict[str, Any] = {
        "get_device_name": "Fake GPU",
        "is_bf16_supported": True,
        "max_memory_allocated": 1,
        "reset_peak_memory_stats": None,
    }
    for name, value in said.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes one on the CPU and moves it


def run(free: int, arguments: list[str]) -> tuple[int, str, str, int]:
    """One command line, with so many bytes free on the GPU."""
    torch.cuda.mem_get_info = lambda *_: (free, free)  # type: ignore[assignment]
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error), _Gpu() as gpu:
        code = main(arguments)
    return code, out.getvalue(), error.getvalue(), gpu.products


if __name__ == "__main__":
    present()
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
