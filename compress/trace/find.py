"""Where the decoder of a stock model is, and which tensors of a layer are coupled to FFN neurons and query heads.

The FFN is a child of the layer that runs by itself: torch-pruning's dependency graph (Fang et al. 2023, DepGraph,
arXiv:2301.12900) follows one of its neurons from the matrix that reads it back to the rows that make it. Attention does
not run by itself; its matrices are told by their shapes and the order in which they are called. All of it is a guess
until prove.py has tried it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.arch.family import Parts
from compress.stream.stock import quiet
from compress.trace import Unproved
from compress.trace.small import key_of, meta, read


@dataclass(frozen=True)
class Coupled:
    """Unit u of `units` owns [(block * units + u) * width, ...) of `axis` of a layer's tensor."""

    tensor: str
    axis: int
    block: int
    width: int


@dataclass(frozen=True)
class Found:
    """What a family is made of. `ffn_key`: the key of the config that sets the FFN's width; `no_heads`: why query heads
    cannot be cut, or None; `no_depth`: why layers cannot go, or None; `beside`: what the model does with its logits
    beside the product, or None."""

    text: str
    parts: Parts
    head: str
    norm: tuple[str, ...]
    before: tuple[str, ...]
    ffn: str
    ffn_cuts: tuple[Coupled, ...]
    ffn_key: str
    output: str
    head_cuts: tuple[Coupled, ...]
    no_heads: str | None
    beside: str | None
    no_depth: str | None = None


def find(model: nn.Module, config: Mapping[str, Any]) -> Found:
    """Look through a small instance, made from `config`. Unproved names what is missing."""
    sizes = read(config)
    text, layers = _layers(model, sizes["num_hidden_layers"])
    decoder, stack = model.get_submodule(text), model.get_submodule(f"{text}.{layers}")
    assert isinstance(stack, nn.ModuleList)
    names = {module: name for name, module in model.named_modules()}
    anything: Any = model
    embedding, head = anything.get_input_embeddings(), anything.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise Unproved("it has no embedding and output matrix of the usual kind")
    inside = names[embedding].removeprefix(f"{text}.")
    if inside == names[embedding] or "." in inside:
        raise Unproved("its embedding does not stand beside its layers")
    _plain_tensors(stack[0])
    order = _called(model)
    before, norm = _around(decoder, stack, embedding, order)
    ffn, ffn_cuts = _ffn(stack[0], sizes["hidden_size"])
    output, head_cuts, no_heads = _heads(stack[0], ffn, sizes, order)
    parts = Parts(inside, layers, norm)
    tensors = tuple(name for name, _ in decoder.get_submodule(norm).named_parameters())
    key = _ffn_key(config, f"{text}.{layers}.0.{ffn}", stack[0].get_submodule(ffn))
    beside = _beside(model, decoder.get_submodule(norm), head)
    return Found(text, parts, names[head], tensors, before, ffn, ffn_cuts, key, output, head_cuts, no_heads, beside)


def _layers(model: nn.Module, count: int) -> tuple[str, str]:
    """Path of the decoder, and what it calls its list of layers."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1 or "." not in outer[0]:
        raise Unproved(f"it has {len(outer)} lists of {count} layers, where a decoder has one")
    text, _, layers = outer[0].rpartition(".")
    return text, layers


def _plain_tensors(layer: nn.Module) -> None:
    """Refuse layers with matrices that are not nn.Linear: experts, convolutions, states."""
    for name, module in layer.named_modules():
        for key, value in module.named_parameters(recurse=False):
            if value.ndim > 2:
                raise Unproved(f"its layers hold a tensor of {value.ndim} axes, {name}.{key}: experts or a convolution")
            if value.ndim == 2 and not (type(module) is nn.Linear and key == "weight"):
                raise Unproved(f"its layers hold a matrix that is no nn.Linear, {name}.{key}")
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            raise Unproved(f"its layers hold a list of modules in {name or 'the layer'}: experts, which are not traced")
    if any(key for key, _ in layer.named_buffers() if key in layer.state_dict()):
        raise Unproved("its layers store buffers")


@torch.no_grad()
def _called(model: nn.Module) -> list[nn.Module]:
    """All modules in the order in which they give their first output."""
    order: dict[nn.Module, None] = {}

    def note(module: nn.Module, args: Any, out: Any) -> None:
        del args, out
        order.setdefault(module, None)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with quiet():
            model(input_ids=torch.arange(6)[None], use_cache=False)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise Unproved(f"a small instance of it does not run: {said}") from None
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _around(
    decoder: nn.Module, stack: nn.ModuleList, embedding: nn.Module, order: list[nn.Module]
) -> tuple[tuple[str, ...], str]:
    """Modules with parameters that run before the first layer, beside the embedding, and the last norm."""
    first, last = order.index(stack[0]), order.index(stack[-1])
    before: list[str] = []
    after: list[str] = []
    for name, module in decoder.named_children():
        weighs = any(True for _ in module.parameters())
        if module is stack or module is embedding or (not weighs and module not in order):
            continue
        if weighs and (module not in order or first < order.index(module) < last):
            raise Unproved(f"its module {name} runs between its layers")
        if order.index(module) > last:
            after.append(name)
        elif weighs:
            before.append(name)
    if len(after) != 1 or any(value.ndim != 1 for value in decoder.get_submodule(after[0]).parameters()):
        raise Unproved(f"one norm must follow its layers, found {', '.join(after) or 'none'}")
    return tuple(before), after[0]


def _ffn(layer: nn.Module, hidden: int) -> tuple[str, tuple[Coupled, ...]]:
    """The Linear that reads FFN neurons, and the tensors that they own, by torch-pruning's dependency graph."""
    found = []
    for name, child in layer.named_children():
        if sum(isinstance(module, nn.Linear) for module in child.modules()) < 2:
            continue
        try:
            with torch.no_grad():
                alone = child(torch.zeros(1, 4, hidden))
        except Exception:  # attention wants more than hidden states: it is not the FFN
            continue
        if isinstance(alone, torch.Tensor):
            found.append((name, child))
    if len(found) != 1:
        raise Unproved(f"{len(found)} modules of a layer run on hidden states alone, where one, the FFN, must")
    name, child = found[0]
    readers = [n for n, m in child.named_modules() if isinstance(m, nn.Linear) and m.out_features == hidden]
    for reader in reversed(readers):
        cuts = _coupled(child, reader, hidden)
        if cuts is not None:
            return f"{name}.{reader}", tuple(Coupled(f"{name}.{c.tensor}", c.axis, c.block, c.width) for c in cuts)
    raise Unproved(f"torch-pruning finds no neurons in {name}")


def _coupled(child: nn.Module, reader: str, hidden: int) -> list[Coupled] | None:
    """The tensors of `child` that a neuron owns which `reader` reads; None where they are no rows and columns alone."""
    import torch_pruning

    linear = child.get_submodule(reader)
    assert isinstance(linear, nn.Linear)
    names, units = {module: name for name, module in child.named_modules()}, linear.in_features
    graph = torch_pruning.DependencyGraph().build_dependency(child, torch.randn(1, 4, hidden), verbose=False)
    owned: list[dict[tuple[str, int], list[int]]] = []
    for unit in (0, units - 1):
        seen: dict[tuple[str, int], list[int]] = {}
        for dependency, rows in graph.get_pruning_group(linear, torch_pruning.prune_linear_in_channels, idxs=[unit]):
            module = dependency.target.module
            if not isinstance(module, nn.Module):
                return None  # a parameter of its own
            if any(True for _ in module.parameters(recurse=False)):
                if not isinstance(module, nn.Linear):
                    return None
                axis = 1 if dependency.handler.__name__ == "prune_in_channels" else 0
                seen[names[module], axis] = sorted(int(row) for row in rows)
        owned.append(seen)
    first, last = owned
    cuts = []
    for (name, axis), rows in first.items():
        blocks = [row // units for row in rows]
        if last.get((name, axis)) != [block * units + units - 1 for block in blocks] or any(r % units for r in rows):
            return None
        cuts += [Coupled(f"{name}.weight", axis, block, 1) for block in blocks]
        if axis == 0 and child.get_submodule(name).bias is not None:
            cuts += [Coupled(f"{name}.bias", 0, block, 1) for block in blocks]
    return cuts if any(cut.axis == 0 for cut in cuts) else None


def _heads(
    layer: nn.Module, ffn: str, sizes: Mapping[str, Any], order: list[nn.Module]
) -> tuple[str, tuple[Coupled, ...], str | None]:
    """The Linear that reads query heads, what they own, and why they cannot be cut where they cannot."""
    hidden, heads, kv_heads, width = (
        sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    others = {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] != ffn.partition(".")[0]
    }
    called = sorted(others, key=lambda name: order.index(others[name]))
    readers = [n for n in called if others[n].in_features == heads * width and others[n].out_features == hidden]
    if not readers:
        raise Unproved(f"no matrix of a layer reads {heads} heads of {width}")
    output = readers[-1]
    owned = [Coupled(f"{output}.weight", 1, 0, width)]
    if kv_heads == heads:
        return output, tuple(owned), "every query head has a KV head of its own, and those stay"
    rows = {heads * width, (heads + 2 * kv_heads) * width}
    makers = [n for n in called if n != output and others[n].out_features in rows]
    if not makers:
        return output, tuple(owned), f"no matrix of a layer makes {heads} heads of {width}"
    owned.append(Coupled(f"{makers[0]}.weight", 0, 0, width))
    if others[makers[0]].bias is not None:
        owned.append(Coupled(f"{makers[0]}.bias", 0, 0, width))
    for name, value in layer.named_parameters():
        inside = name.partition(".")[0] == output.partition(".")[0]
        if inside and value.ndim == 1 and len(value) == heads * width and name.rpartition(".")[0] not in others:
            owned.append(Coupled(name, 0, 0, width))  # a norm over all query heads; the proof tells what it is
    return output, tuple(owned), None


def _ffn_key(config: Mapping[str, Any], path: str, reader: nn.Module) -> str:
    """The key of the config that sets how many columns the FFN's reader has: tried, one after another."""
    width = int(reader.in_features)  # type: ignore[arg-type]
    usual = key_of(config, "intermediate_size")
    same = [key for key, value in config.items() if value == width and type(value) is int]
    maybe = [key for key, value in config.items() if value is None and key.endswith(("inner", "dim", "size"))]
    for key in dict.fromkeys((usual, *same, *maybe)):
        try:
            changed = meta({**config, key: width - 8}).get_submodule(path)
        except Exception:  # a key that means something else
            continue
        if getattr(changed, "in_features", None) == width - 8:
            return key
    raise Unproved("no key of its config sets the width of its FFN")


@torch.no_grad()
def _beside(model: nn.Module, norm: nn.Module, head: nn.Linear) -> str | None:
    """Whether logits are the product of the last hidden states and the output matrix, and nothing else."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            del module, args
            seen[name] = out

        return hook

    handle = norm.register_forward_hook(keep("hidden"))
    try:
        logits = model(input_ids=torch.arange(6)[None], use_cache=False).logits
    finally:
        handle.remove()
    if torch.allclose(logits, seen["hidden"] @ head.weight.T, rtol=1e-4, atol=1e-5):
        return None
    return "its logits are scaled, capped or shifted"
