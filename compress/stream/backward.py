"""One streamed backward pass: what the next-token loss of calibration windows says of every unit of every layer.

The forward keeps the inputs of all layers (tape.py); then layers are loaded in reverse, each computes its forward anew
with a graph, batch by batch, and hands the gradient at its inputs on. Memory: one layer, one batch with its graph, the
gradient at the hidden states of all windows, and the tape where it is small. Logits exist for one batch and one block
of the vocabulary at a time.

Let S = the sum of -log p(next token) over all windows and positions but each window's last, in nats, T = N (L - 1) such
tokens, and g_t = dS / dy_t the gradient at the output y_t [hidden] of a group's reader (o_proj, down_proj) at token t.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from compress.arch import Group
from compress.errors import UserError
from compress.limits import BATCH_TOKENS, vocab_rows
from compress.machine import Progress, Silent, Task
from compress.stream import Statistic
from compress.stream.fed import Fed
from compress.stream.forward import Stream, check_numbers
from compress.stream.tape import Tape
from compress.stream.vision import Sight, show, token_positions

Found = list[dict[str, dict[Statistic, torch.Tensor]]]  # a map of groups a layer
BLIND = Sight()  # text alone
Full = Callable[[int, str, torch.Tensor], None]  # layer, group, [hidden, hidden]


def gradients(
    stream: Stream,
    ids: torch.Tensor,
    groups: Sequence[Sequence[Group]],
    wanted: Collection[Statistic],
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
    full: Full | None = None,
    sight: Sight = BLIND,
) -> Found:
    """The `wanted` statistics of every layer, for its own `groups`, on the windows `ids` [N, L]: float32, in the
    machine's memory.

    taylor [units]: sum over all weights w that the unit owns (the group's cuts, biases among them) of |w dS/dw| / T.
    fisher [units]: mean over the windows of (dL_n / dm_u)^2, L_n the window's mean loss, m_u = 1 a factor of the unit's
    columns in the reader's input, at all of the window's tokens.
    output_fisher [hidden]: the diagonal of E[g g^T] = sum over t of g_t g_t^T / T. `full` is given the whole matrix
    [hidden, hidden], float32 on the stream's device, layer by layer from the last to the first; none is kept.

    `sight`: images among the tokens, and whose prediction counts: S, T and L_n are then of those tokens alone.
    `scratch`: a folder for the inputs of the layers where they are large; None: they stay in memory. All runs in
    float32, whatever the stream's dtype: in bfloat16, SmolLM2's layers before its massive activations (0 to 10) had
    statistics up to 12 times too small. Raises MachineError where the disk is full, UserError as `Stream`, and for a
    model that does more with its logits (Family.head_beside) or where activations or gradients are no numbers.
    """
    length = ids.shape[1]
    if length < 2:
        raise ValueError(f"windows of {length} token: none is predicted")
    beside = stream.family.head_beside(stream.reader.header.text_config)
    if beside is not None:
        raise UserError(f"{stream.reader.folder}: {beside}, and the gradient of the loss knows none of that")
    stream = stream.in_float32()
    found: Found = [{} for _ in range(stream.layers)]
    hidden, positions = stream.embed(ids), token_positions(stream, ids, sight.images)
    show(stream, hidden, ids, sight.images, progress or Silent())
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool) if sight.counted is None else sight.counted[:, 1:]
    with (
        Tape(stream.layers, hidden.shape, scratch) as tape,
        (progress or Silent()).task("gradients: forward and backward", 2 * stream.layers) as task,
        _repeatable(stream.device),
    ):
        for index in range(stream.layers):
            tape.write(index, hidden)
            with stream.layer(index) as layer:
                stream.advance(layer, hidden, positions=positions)
            check_numbers(hidden, index)
            task.advance()
        _head(stream, hidden, ids, counted)
        if not bool(torch.isfinite(hidden).all()):
            raise UserError("the gradient of the loss is NaN or infinite: the model's logits overflow")
        _backward(stream, tape, Fed(hidden, None, positions), counted.sum(1), groups, wanted, full, found, task)
    return found


def _backward(
    stream: Stream,
    tape: Tape,
    slopes: Fed,
    counts: torch.Tensor,
    groups: Sequence[Sequence[Group]],
    wanted: Collection[Statistic],
    full: Full | None,
    found: Found,
    task: Task,
) -> None:
    """All layers in reverse. `slopes` holds dS [N, L, hidden] at the outputs of the last layer, and is overwritten;
    counts [N]: tokens that are predicted."""
    windows, length, hidden = slopes.hidden.shape
    batch, tokens = max(1, BATCH_TOKENS // length), max(1, int(counts.sum()))
    for index in reversed(range(stream.layers)):
        with stream.layer(index) as layer:
            sums = _Layer(stream, layer, hidden, groups[index], wanted, full is not None)
            for start in range(0, windows, batch):
                stop = min(start + batch, windows)
                inputs, part = tape.read(index, start, stop).to(stream.device), slopes.part(start, stop)
                here = part.hidden.to(stream.device)
                part.hidden.copy_(sums.add(inputs, here, counts[start:stop], part.positions))
            found[index] = sums.results(windows, tokens)
            if full is not None:
                for name, matrix in sums.full(tokens):
                    full(index, name, matrix)
        if not bool(torch.isfinite(slopes.hidden).all()):
            raise UserError(f"layer {index}: the gradient of the loss at its input is NaN or infinite")
        tape.forget(index)
        task.advance()


class _Layer:
    """The sums of one layer, while it is in memory."""

    def __init__(
        self,
        stream: Stream,
        layer: nn.Module,
        hidden: int,
        groups: Sequence[Group],
        wanted: Collection[Statistic],
        full: bool,
    ) -> None:
        device = stream.device
        self._stream, self._layer, self._groups, self._wanted = stream, layer, groups, wanted
        names = {cut.tensor for group in groups for cut in group.cuts} if "taylor" in wanted else set()
        self._weights = {name: layer.get_parameter(name) for name in sorted(names)}
        self._sums = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        self._fisher = {group.name: torch.zeros(group.units, dtype=torch.float64, device=device) for group in groups}
        self._output = {group.name: torch.zeros(hidden, dtype=torch.float64, device=device) for group in groups}
        self._full = {group.name: torch.zeros(hidden, hidden, device=device) for group in groups if full}

    def add(
        self, inputs: torch.Tensor, gradient: torch.Tensor, counts: torch.Tensor, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum what one batch says; inputs and the gradient at the outputs -> that at the inputs, [n, L, hidden].
        counts [n]: tokens that are predicted; positions [3, n, L] of tokens, where images stand between them."""
        weights = list(self._weights.values())
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), _watching(self._layer, self._groups) as seen:
            out = self._stream.through(self._layer, inputs.requires_grad_(True), positions)
        watched = [tensor for group in self._groups for tensor in seen[group.name]]
        slopes = torch.autograd.grad(out, [inputs, *weights, *watched], gradient)
        for name, slope in zip(self._weights, slopes[1:], strict=False):
            self._sums[name] += slope
        pairs = iter(slopes[1 + len(weights) :])
        for group in self._groups:
            self._add(group, seen[group.name][0].detach(), next(pairs), next(pairs), counts)
        return slopes[0]

    def _add(self, group: Group, x: torch.Tensor, at_x: torch.Tensor, at_y: torch.Tensor, counts: torch.Tensor) -> None:
        """One batch of a reader's inputs x [n, L, units*width], and the gradients there and at its outputs."""
        if "fisher" in self._wanted:
            masks = (x * at_x).sum(1).unflatten(-1, (group.units, group.width)).sum(-1)
            self._fisher[group.name] += (masks / counts.clamp_min(1).to(masks.device)[:, None]).square().sum(0)
        flat = at_y.flatten(0, -2)
        if "output_fisher" in self._wanted:
            self._output[group.name] += flat.square().sum(0)
        if self._full:
            self._full[group.name].addmm_(flat.T, flat)

    def results(self, windows: int, tokens: int) -> dict[str, dict[Statistic, torch.Tensor]]:
        """What was wanted, by group."""
        found: dict[str, dict[Statistic, torch.Tensor]] = {group.name: {} for group in self._groups}
        for group in self._groups:
            mine = found[group.name]
            if "taylor" in self._wanted:
                mine["taylor"] = self._taylor(group, tokens).float().cpu()
            if "fisher" in self._wanted:
                mine["fisher"] = (self._fisher[group.name] / windows).float().cpu()
            if "output_fisher" in self._wanted:
                mine["output_fisher"] = (self._output[group.name] / tokens).float().cpu()
        return found

    def full(self, tokens: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The groups' matrices E[g g^T]."""
        for group in self._groups:
            yield group.name, self._full.pop(group.name).div_(tokens)

    def _taylor(self, group: Group, tokens: int) -> torch.Tensor:
        total = torch.zeros(group.units, dtype=torch.float64, device=self._stream.device)
        for cut in group.cuts:
            weight, slope = (
                tensor.detach().narrow(cut.axis, cut.offset, group.units * cut.width)
                for tensor in (self._weights[cut.tensor], self._sums[cut.tensor])
            )
            products = (weight * slope).abs_().movedim(cut.axis, 0)
            total += products.reshape(group.units, -1).sum(1)
        return total / tokens


@contextmanager
def _watching(layer: nn.Module, groups: Sequence[Group]) -> Iterator[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]:
    """While open, what the groups' readers take and give, by group, with its graph."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def see(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            del module
            seen[name] = args[0], out

        return see

    handles = [layer.get_submodule(group.reader).register_forward_hook(hook(group.name)) for group in groups]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _head(stream: Stream, hidden: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor) -> None:
    """The outputs of the last layer [N, L, hidden] become dS at them, in place. The last token of a window predicts
    nothing; every other one gives E_p[W] - W[next], W the rows of the output matrix and p the model's distribution,
    where the next one is `counted` [N, L - 1]."""
    norm, length = stream.last_norm(), ids.shape[1]
    batch = max(1, BATCH_TOKENS // length)
    for start in range(0, len(ids), batch):
        part = hidden[start : start + batch]
        here = part.to(stream.device, copy=True).requires_grad_(True)
        with torch.enable_grad():
            normed = norm(here)
        rows = normed.detach()[:, :-1].flatten(0, 1)
        slope = torch.zeros_like(normed)
        slope[:, :-1] = _slope(stream, rows, ids[start : start + batch, 1:].flatten()).view_as(normed[:, :-1])
        slope[:, :-1] *= counted[start : start + batch, :, None].to(slope.device)
        part.copy_(torch.autograd.grad(normed, here, slope)[0])


@torch.no_grad()
def _slope(stream: Stream, normed: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """E_p[W] - W[next] [T, hidden] for normed hidden states [T, hidden] and the tokens that follow them [T], float32.

    One pass over blocks of the vocabulary: the mean row under a softmax whose largest logit is not known yet, as in
    attention by blocks (Milakov & Gimelshein 2018; Dao et al. 2022): what was summed is scaled down when a larger
    logit comes.
    """
    name = stream.family.head_tensor(stream.reader.header)
    vocab, columns = stream.reader.spec(name).shape
    top = torch.full((len(normed), 1), -torch.inf, device=normed.device)
    total, mean = torch.zeros_like(top), torch.zeros_like(normed)
    for start in range(0, vocab, vocab_rows(columns)):
        block = stream.reader.rows(name, slice(start, start + vocab_rows(columns)), torch.float32)
        logits = normed @ block.T
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        shrink = (top - higher).exp_()
        weights = logits.sub_(higher).exp_()
        total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        mean.mul_(shrink).addmm_(weights, block)
        top = higher
    unique, inverse = torch.unique(following, return_inverse=True)
    rows = stream.reader.rows(name, unique.tolist(), torch.float32)
    return mean.div_(total).sub_(rows[inverse.to(rows.device)])


@contextmanager
def _repeatable(device: str) -> Iterator[None]:
    """While open, torch picks kernels that give the same bytes in every run: on a GPU, the fastest backward of
    attention adds in any order."""
    if device == "cpu":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
