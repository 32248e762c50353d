"""KV heads merged: the keys and values of several heads become those of one, and o_proj is refitted to what it read.

`mean` averages the heads' matrices (Ainslie et al. 2023, GQA, arXiv:2305.13245, section 2.1). `aligned` first turns
each head by what its queries, or its columns of o_proj, can undo, and takes the best common head (`common_head`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from compress.arch.family import Family
from compress.arch.kv import K_NORM
from compress.arch.layer import QKV, QKV_FUSED
from compress.arch.rope import INTERLEAVED, Orders, arranged, rotary_rows
from compress.checkpoint.headers import Header
from compress.errors import UserError
from compress.solve import Refit, damping_vector, refit_to
from compress.steps.prune.options import ALIGNED
from compress.stream.fed import Fed
from compress.stream.forward import Stream
from compress.stream.statistics import Cross, Gram

OUT = "self_attn.o_proj"
FLOOR = 1e-6  # share of the largest weight that every direction has: what nothing reads must not be undefined
TINY = 1e-30


@dataclass(frozen=True)
class Heads:
    """The rows that make queries, keys and values of one layer, with their biases as a last column if they have any:
    q [H, d, n], k and v [G, d, n]; `out` [hidden, H, d]: the columns of o_proj. `group` [H]: the KV head of each query
    head."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    group: torch.Tensor


def read_heads(tensors: Mapping[str, torch.Tensor], group: torch.Tensor, kv_heads: int, head_dim: int) -> Heads:
    """The heads of a layer's tensors, in float32; `group` [H]: the KV head that each query head reads."""
    queries, keys = len(group) * head_dim, kv_heads * head_dim

    def rows(name: str) -> torch.Tensor:
        parts = [tensors[f"{name}.weight"].float()]
        if f"{name}.bias" in tensors:
            parts.append(tensors[f"{name}.bias"].float()[:, None])
        return torch.cat(parts, dim=1)

    if f"{QKV_FUSED}.weight" in tensors:
        q, k, v = rows(QKV_FUSED).split([queries, keys, keys])
    else:
        q, k, v = (rows(name) for name in QKV)
    out = tensors[f"{OUT}.weight"].float().unflatten(1, (-1, head_dim))
    q, k, v = (part.unflatten(0, (-1, head_dim)) for part in (q, k, v))
    return Heads(q, k, v, out, group)


def write_heads(tensors: Mapping[str, torch.Tensor], heads: Heads) -> dict[str, torch.Tensor]:
    """The layer's tensors with `heads` in the place of their own, in the dtypes that they have."""
    parts = [part.flatten(0, 1) for part in (heads.q, heads.k, heads.v)]
    fused = f"{QKV_FUSED}.weight" in tensors
    made = {QKV_FUSED: torch.cat(parts)} if fused else dict(zip(QKV, parts, strict=True))
    new = {**tensors, f"{OUT}.weight": heads.out.flatten(1).to(tensors[f"{OUT}.weight"].dtype)}
    for name, rows in made.items():
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        new[f"{name}.weight"] = rows[:, : weight.shape[1]].to(weight.dtype).contiguous()
        if bias is not None:
            new[f"{name}.bias"] = rows[:, -1].to(bias.dtype).contiguous()
    return new


def mean_heads(heads: Heads, keep: int) -> Heads:
    """Every `G // keep` KV heads in a row averaged into one."""
    size = len(heads.k) // keep
    k, v = (part.unflatten(0, (keep, size)).mean(1) for part in (heads.k, heads.v))
    return Heads(heads.q, k, v, heads.out, heads.group // size)


def aligned_heads(heads: Heads, keep: int, inputs: torch.Tensor, pairs: torch.Tensor | None) -> Heads:
    """Every `G // keep` KV heads in a row as the one that best stands for them all.

    `inputs` [n, n]: the Gram matrix X^T X / T of what the three projections read, with a one behind each token if they
    have biases. pairs [2, r/2]: the rows of a head that rotate together; None: keys are averaged, because a norm stands
    between them and the rotation.

    Keys: a score is Re(conj(q_t) e^{i(t-s)w} k_s), summed over the pairs of rows that rotate, each read as one complex
    number, and q . k over the rest. What the rotation lets pass is a complex factor a pair (a turn and a scale: the
    matrices that commute with all rotations of the plane), and any matrix over the rest. So each pair is a
    `common_head` of width 1 over the complex numbers, weighted by the energy of the queries that read it, and the rest
    is one over the reals, weighted by their second moments. Values: any matrix, weighted by what o_proj makes of them.
    """
    size = len(heads.k) // keep
    merged = mean_heads(heads, keep)
    k, v, q, out = merged.k.clone(), merged.v.clone(), heads.q.clone(), heads.out.clone()
    for new in range(keep):
        members = range(new * size, (new + 1) * size)
        readers = [(heads.group == member).nonzero().flatten() for member in members]
        old = replace(heads, k=heads.k[list(members)], v=heads.v[list(members)])
        _values(old, readers, inputs, v[new], out)
        if pairs is not None:
            _keys(old, readers, inputs, pairs, k[new], q)
    return Heads(q, k, v, out, merged.group)


Readers = list[torch.Tensor]  # the query heads of each KV head that is merged


def _values(old: Heads, readers: Readers, inputs: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """The common values of the heads `old` into v [d, n], and their columns of o_proj into `out`."""
    weights = torch.stack([torch.einsum("ohd,ohe->de", old.out[:, own], old.out[:, own]) for own in readers])
    taken, given = common_head(weights.double(), _gram(old.v, inputs))
    v.copy_(torch.einsum("dge,gen->dn", taken.to(v.dtype), old.v))
    for own, turn in zip(readers, given.to(out.dtype), strict=True):
        out[:, own] = old.out[:, own] @ turn


def _keys(
    old: Heads, readers: Readers, inputs: torch.Tensor, pairs: torch.Tensor, k: torch.Tensor, q: torch.Tensor
) -> None:
    """The common keys of the heads `old` into k [d, n], and the queries that read them into their places in q."""
    each = _moments(old.q, inputs)
    asked = torch.stack([each[own].sum(0) for own in readers])
    seen = _gram(old.k, inputs)  # [size, d, size, d]; asked [size, d, d]
    a, b = pairs
    energy = asked[:, a, a] + asked[:, b, b]  # [size, pairs]
    turned = torch.complex(  # E[conj(z_g) z_h], [pairs, size, size]: indices that stand apart come first
        seen[:, a, :, a] + seen[:, b, :, b], seen[:, a, :, b] - seen[:, b, :, a]
    )
    taken, given = common_head(energy.T[..., None, None].to(turned.dtype), turned[:, :, None, :, None])
    keys = torch.complex(old.k[:, a], old.k[:, b])  # [size, pairs, n]
    made = torch.einsum("pg,gpn->pn", taken[:, 0, :, 0].to(keys.dtype), keys)
    k[a], k[b] = made.real, made.imag
    for member, own in enumerate(readers):
        answer = given[:, member, 0, 0].conj().to(keys.dtype)
        rows = torch.complex(old.q[own][:, a], old.q[own][:, b]) * answer[:, None]
        q[own[:, None], a], q[own[:, None], b] = rows.real, rows.imag
    free = torch.ones(len(k), dtype=torch.bool, device=k.device)
    free[pairs.flatten()] = False
    rest = free.nonzero().flatten()
    if not len(rest):
        return
    taken, given = common_head(asked[:, rest][:, :, rest], seen[:, rest][:, :, :, rest])
    k[rest] = torch.einsum("dge,gen->dn", taken.to(k.dtype), old.k[:, rest])
    for own, turn in zip(readers, given.to(q.dtype), strict=True):
        q[own[:, None], rest] = turn.T @ old.q[own][:, rest]


def common_head(weights: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head of width m that best stands for f heads of width m, and how each is got back from it.

    With Z_g [T, m] what head g gives and S_g = L_g L_g^H what its readers weigh it by, the least
    sum_g ||(Z_g - Z P_g^T) L_g||^2 over Z and P is the best approximation of rank m of [Z_1 L_1 ... Z_f L_f] (Eckart &
    Young 1936): with U [f*m, m] the leading eigenvectors of its Gram matrix, z = sum_g U_g^T L_g^T z_g and
    P_g = L_g^-T conj(U_g). Heads that are the same but for what a P can undo come out exact.

    weights [*, f, m, m] = S, gram [*, f, m, f, m] = Z^H Z / T, real or complex, in double precision. Returns
    `taken` [*, m, f, m], z = sum_g taken[:, g] z_g, scaled to the mean size of the old heads; `given` [*, f, m, m] = P.
    """
    heads, width = gram.shape[-2:]
    largest = weights.diagonal(dim1=-2, dim2=-1).real.amax((-2, -1))[..., None, None].clamp_min(TINY)
    eye = torch.eye(width, dtype=weights.dtype, device=weights.device)
    lower = torch.linalg.cholesky(weights / largest[..., None] + FLOOR * eye)
    product = torch.einsum("...gai,...gahb,...hbj->...gihj", lower.conj(), gram, lower)
    values, vectors = torch.linalg.eigh(product.flatten(-4, -3).flatten(-2, -1))
    leading = vectors[..., -width:].unflatten(-2, (heads, width))
    taken = torch.einsum("...gic,...gai->...cga", leading, lower)
    given = torch.linalg.solve_triangular(lower.mT, leading.conj(), upper=True)
    size = torch.einsum("...gaga->...", gram).real / heads
    scale = (size.clamp_min(TINY) / values[..., -width:].sum(-1).clamp_min(TINY)).sqrt()[..., None, None, None]
    return taken * scale, given / scale


def _gram(rows: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """E[y y^T] [g, d, g, d] of y = rows . x, rows [g, d, n]."""
    flat = rows.flatten(0, 1)
    found = (flat @ inputs @ flat.T).double()
    heads: torch.Tensor = found.unflatten(1, rows.shape[:2]).unflatten(0, rows.shape[:2])
    return heads


def _moments(rows: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """E[y y^T] [g, d, d] of each head alone."""
    moments: torch.Tensor = (rows @ inputs) @ rows.mT
    return moments.double()


def rotating_pairs(stream: Stream, header: Header, layer: int, names: Container[str]) -> torch.Tensor | None:
    """The rows of a head of `layer` that rotate together, [2, r/2]; None where keys pass a norm before they rotate."""
    if K_NORM in names:
        return None
    told = getattr(stream.text.config, "no_rope_layers", None)  # of smollm3; 1: it rotates, whatever the name says
    still = isinstance(told, list) and not told[layer]
    rotary = 0 if still else rotary_rows(stream.family.sizes(header), header.text_config, stream.family.rotary)
    rows = torch.arange(rotary, device=stream.device)
    pairs: torch.Tensor = rows.view(-1, 2).T if stream.family.rope == INTERLEAVED else rows.view(2, -1)
    return pairs


class _Enough(Exception):
    """Raised by a hook that has seen what it waits for: what the layer would do next is not needed."""


class Merger:
    """Merges the KV heads of one layer after the other; `before` and `after` run layers as they were and as they
    become."""

    def __init__(
        self, family: Family, header: Header, keep: int, method: str, refit: float | None, before: Stream, after: Stream
    ) -> None:
        """`keep`: KV heads that stay; `refit`: the damping of the refit of o_proj, None for none."""
        self.family, self.header, self.keep = family, header, keep
        self.method, self.refit, self.before, self.after = method, refit, before, after
        self.sizes = family.sizes(header)
        self.looks = refit is not None or method == ALIGNED  # whether it looks at a text

    def merge(
        self,
        place: tuple[int, int],
        original: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        stay: torch.Tensor | None,
        fed: Fed | None,
        orders: Orders,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float] | None]:
        """The layer `tensors` with its KV heads merged, and the errors of the refit, relative to the output of o_proj.

        place: the layer in the source and in the result. original: its tensors in the source, tensors: with the
        `stay` [H] query heads alone (None: all). fed: what goes into it. orders: of rotary rows in the result.
        """
        source, sizes, device = place[0], self.sizes, self.before.device
        stay = torch.arange(sizes.heads, device=device) if stay is None else stay.to(device)
        heads = read_heads(tensors, stay // sizes.group_size, sizes.kv_heads, sizes.head_dim)
        if self.method == ALIGNED:
            assert fed is not None
            inputs = self._inputs(source, original, fed)
            pairs = rotating_pairs(self.before, self.header, source, tensors.keys())
            try:
                made = aligned_heads(heads, self.keep, inputs[: heads.q.shape[2], : heads.q.shape[2]], pairs)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in its stubs
                raise UserError(f"layer {source}: KV heads cannot be aligned: keys or values overflow") from None
        else:
            made = mean_heads(heads, self.keep)
        new = write_heads(tensors, made)
        if self.refit is None:
            return new, None
        assert fed is not None
        found = self._refitted(place, original, new, fed, orders)
        new[f"{OUT}.weight"] = found.weight.to(new[f"{OUT}.weight"].dtype)
        return new, {"error": found.error, "error_without_refit": found.error_before}

    def _inputs(self, source: int, original: Mapping[str, torch.Tensor], fed: Fed) -> torch.Tensor:
        """The Gram matrix [hidden + 1, hidden + 1] of what the projections read, with a one behind each token."""
        gram = Gram(fed.hidden.shape[-1] + 1, 1, self.before.device)
        weights: list[torch.Tensor | None] = []

        def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            read = args[0].float()
            gram.add(torch.cat([read, torch.ones_like(read[..., :1])], dim=-1), weights.pop())
            raise _Enough

        reader = QKV_FUSED if f"{QKV_FUSED}.weight" in original else QKV[0]
        with self.before.layer_from(source, original) as layer:
            handle = layer.get_submodule(reader).register_forward_pre_hook(see)
            for part in fed.batches():
                weights.append(part.weights_on(self.before.device))
                _until_enough(self.before, layer, part)
            handle.remove()
        found = gram.result()
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"layer {source} {reader}: activations are NaN or infinite")
        return found

    def _refitted(
        self,
        place: tuple[int, int],
        original: Mapping[str, torch.Tensor],
        new: Mapping[str, torch.Tensor],
        fed: Fed,
        orders: Orders,
    ) -> Refit:
        """o_proj of the merged layer, such that it gives what the original gave: both run side by side."""
        source, index = place
        weight = new[f"{OUT}.weight"].float()
        cross, last = Cross(len(weight), weight.shape[1], self.before.device), []
        weights: list[torch.Tensor | None] = []

        def wanted(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            del args
            bias = module.bias
            last.append(out.float() - bias.float() if isinstance(bias, torch.Tensor) else out.float())
            raise _Enough

        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            cross.add(args[0].float(), last.pop(), weights.pop())
            raise _Enough

        placed = {name: arranged(name, value, orders) for name, value in new.items()}
        with self.before.layer_from(source, original) as one, self.after.layer_from(index, placed) as other:
            handles = [
                one.get_submodule(OUT).register_forward_hook(wanted),
                other.get_submodule(OUT).register_forward_pre_hook(seen),
            ]
            for part in fed.batches():
                weights.append(part.weights_on(self.before.device))
                _until_enough(self.before, one, part)
                _until_enough(self.after, other, part)
            for handle in handles:
                handle.remove()
        gram, product, energy = cross.result()
        assert self.refit is not None
        return refit_to(weight, gram, product, energy, damping_vector(gram, self.refit), f"layer {source} {OUT}")


def _until_enough(stream: Stream, layer: nn.Module, fed: Fed) -> None:
    with suppress(_Enough):
        stream.advance(layer, fed.hidden, keep=False, positions=fed.positions)
