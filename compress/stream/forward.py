"""Run a checkpoint layer by layer with the stock transformers classes, one decoder layer in memory at a time.

The stock model is built on the meta device, so its own config decides every shape; a layer's tensors are read, assigned
to it, all windows pass through, and it is emptied again. Memory: one layer, the windows' hidden states, one batch. On a
GPU the layer and the batch are there, the hidden states of all windows in the machine's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.arch import Family
from compress.arch.rope import arranged
from compress.checkpoint.reader import Reader, finite
from compress.device import precision_of
from compress.errors import UserError
from compress.limits import BATCH_TOKENS, vocab_rows
from compress.machine import Progress, Silent, return_freed_memory
from compress.stream.arranged import Arranged, stock_view
from compress.stream.calls import Calls, Last, empty, forward_of
from compress.stream.stock import stock_model

# Makes the module that runs for one Linear: (reader, linear on meta, its full name, compute dtype) -> module. The
# formats have one for every layout on disk; `plain_linear` reads `NAME.weight` as it is.
LinearLoader = Callable[[Reader, nn.Linear, str, torch.dtype], nn.Module]


def plain_linear(reader: Reader, linear: nn.Linear, name: str, dtype: torch.dtype) -> nn.Module:
    """A stock nn.Linear with the stored weight (and bias)."""
    assign(linear, "weight", reader.tensor(f"{name}.weight", dtype))
    if linear.bias is not None:
        assign(linear, "bias", reader.tensor(f"{name}.bias", dtype))
    return linear


def assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of a meta parameter; a shape the config did not imply is the user's to know."""
    old = getattr(module, name)
    if old.shape != value.shape:
        raise UserError(
            f"config.json implies shape {list(old.shape)} for '{name}' of {type(module).__name__}, "
            f"found {list(value.shape)}"
        )
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def check_numbers(hidden: torch.Tensor, layer: int) -> None:
    """UserError where hidden states that `layer` gave are NaN or infinite."""
    if not finite(hidden):
        raise UserError(f"layer {layer}: its output is NaN or infinite: activations overflow")


def compute_dtype(stored: str, device: str = "cpu") -> tuple[torch.dtype, str]:
    """The dtype layers run in for a checkpoint stored in `stored`, and why."""
    if stored == "BF16":
        precision = precision_of(device)
        return (torch.bfloat16 if precision.native else torch.float32), precision.reason
    if stored == "F16" and device != "cpu":
        return torch.float16, "float16, as the checkpoint"
    if stored == "F16":
        return torch.float32, "float32, because float16 is slow on a processor"
    return torch.float32, "float32, as the checkpoint"


class Stream:
    """The decoder of one checkpoint folder, executed layer by layer in `dtype`, where `reader` puts its tensors.

    `config` replaces the folder's own (a step that changes shapes runs its new layers under the planned config, and
    under the planned family). Layers of a family that stock transformers does not load run in the equal stock classes.
    """

    def __init__(
        self,
        reader: Reader,
        family: Family,
        *,
        dtype: torch.dtype,
        linear: LinearLoader = plain_linear,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._made_from = reader, config
        stock, self._orders = stock_view(family, config or reader.header.config)
        self.reader = Arranged(reader, family.inside, self._orders) if self._orders else reader
        self.family, self.dtype, self._linear, self.device = family, dtype, linear, reader.device
        self.model = stock_model(stock)
        self.text = self.model.get_submodule(family.text)
        self.layers = len(self._layer_list())
        self._index = {layer: index for index, layer in enumerate(self._layer_list())}
        norm = self.text.get_submodule(family.parts.norm)
        self._calls = Calls(self.text, self._layer_list(), norm, self._initialize, self.device)
        for part in family.before:
            self._fill(part)
        self._check_tie()
        self._rehearse()

    def in_float32(self) -> Stream:
        """The same model, run in float32."""
        if self.dtype == torch.float32:
            return self
        reader, config = self._made_from
        return Stream(reader, self.family, dtype=torch.float32, linear=self._linear, config=config)

    def _initialize(self, module: nn.Module) -> None:
        made: Any = self.model
        made._init_weights(module)  # what stock transformers calls for buffers that are not stored

    def _rehearse(self) -> None:
        """One layer on the meta device: a config that stock transformers builds may still be none that it can run."""
        try:
            self._calls.rehearse(self.family.sizes(self.reader.header).hidden, self.dtype)
        except Exception as error:  # whatever stock code raises: a split that does not add up, shapes, a type
            said = " ".join(str(error).split())
            raise UserError(f"config.json: stock transformers cannot run it: {said}") from error

    def _check_tie(self) -> None:
        """Stock transformers does not tie two stored matrices that differ, whatever the config says."""
        stored, shared = f"{self.family.head}.weight", self.family.head_tensor(self.reader.header)
        if stored == shared or stored not in self.reader:
            return
        rows, columns = self.reader.spec(shared).shape
        for start in range(0, rows, vocab_rows(columns)):
            part = slice(start, start + vocab_rows(columns))
            if not torch.equal(self.reader.rows(stored, part), self.reader.rows(shared, part)):
                raise UserError(
                    f"{self.reader.folder}: config.json ties {self.family.head} to the embedding, but both are stored "
                    "and differ",
                    hint="set tie_word_embeddings to false in config.json",
                )

    def _layer_list(self) -> nn.ModuleList:
        layers = self.text.get_submodule(self.family.parts.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer gets for `ids` [N, L]: token embeddings [N, L, hidden], scaled where the stock model
        scales them; only the rows that occur are read."""
        name = self.family.embedding
        rows = self.reader.spec(name).shape[0]
        if int(ids.max()) >= rows:
            raise UserError(f"{self.reader.folder}: the tokenizer gives id {int(ids.max())}, the model has {rows} rows")
        unique, inverse = torch.unique(ids, return_inverse=True)
        table = self.text.get_submodule(self.family.parts.embedding)
        whole, padding = table.weight, table.padding_idx
        table.padding_idx = None  # type: ignore[assignment]  # it may be no row of the part
        table.weight = nn.Parameter(self.reader.rows(name, unique.tolist(), self.dtype), requires_grad=False)
        found = torch.empty(*ids.shape, table.weight.shape[1], dtype=self.dtype)
        batch = max(1, BATCH_TOKENS // ids.shape[1])
        try:
            for start in range(0, len(ids), batch):
                found[start : start + batch] = self._calls.first(inverse[start : start + batch].to(self.device))
        except IndexError as error:  # the rows are there: what is looked up besides them is the position
            raise UserError(
                f"{self.reader.folder}: windows of {ids.shape[1]} tokens, and its table of positions is shorter",
                hint="a smaller length of the text's windows (--length)",
            ) from error
        table.weight, table.padding_idx = whole, padding
        return found

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index`, filled from disk; emptied again on exit."""
        module = self._layer_list()[index]
        originals = dict(module.named_modules())
        prefix = self.family.prefix(index)
        for name, child in originals.items():
            if isinstance(child, nn.Linear):
                module.set_submodule(name, self._linear(self.reader, child, prefix + name, self.dtype))
            else:
                for key, _ in list(child.named_parameters(recurse=False)):
                    inside = f"{name}.{key}" if name else key
                    assign(child, key, self.reader.tensor(prefix + inside, self.dtype))
        try:
            yield module
        finally:
            for name, child in originals.items():
                if isinstance(child, nn.Linear):
                    module.set_submodule(name, child)
            empty(module)
            return_freed_memory()

    @contextmanager
    def layer_from(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        """Decoder layer `index` filled with `tensors` (names inside the layer) instead of the folder's."""
        module = self._layer_list()[index]
        placed = {name: value.to(self.device, self.dtype) for name, value in tensors.items()}
        state = {name: arranged(name, value, self._orders) for name, value in placed.items()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        try:
            yield module
        finally:
            empty(module)
            return_freed_memory()

    @torch.no_grad()
    def advance(
        self, layer: nn.Module, hidden: torch.Tensor, *, keep: bool = True, positions: torch.Tensor | None = None
    ) -> None:
        """Pass hidden states [N, L, hidden] through one layer, in place; `keep=False` only for what hooks see.
        positions [3, N, L]: of the tokens, where images stand between them."""
        batch = max(1, BATCH_TOKENS // hidden.shape[1])
        for start in range(0, len(hidden), batch):
            part = hidden[start : start + batch]
            at = None if positions is None else positions[:, start : start + batch]
            out = self.through(layer, part.to(self.device), at)
            if keep:
                part.copy_(out)

    def through(self, layer: nn.Module, here: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What a layer of this stream makes of one batch [n, L, hidden] that is where the layer is, with the mask and
        the positions that the stock model gives it for text without padding, or at `positions` [3, n, L]; with a graph
        where torch makes one."""
        return self._calls.of(self._index[layer], here, positions).of(layer, here)

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, progress: Progress | None = None, label: str = "forward") -> torch.Tensor:
        """Final hidden states [N, L, hidden], after the last norm: what the output matrix reads."""
        hidden = self.embed(ids)
        with (progress or Silent()).task(label, self.layers) as task:
            for index in range(self.layers):
                with self.layer(index) as layer:
                    self.advance(layer, hidden)
                task.advance()
        return self.norm(hidden)

    @torch.no_grad()
    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder's last norm, in place, batch by batch."""
        norm = self.last_norm()
        batch = max(1, BATCH_TOKENS // hidden.shape[1])
        for start in range(0, len(hidden), batch):
            hidden[start : start + batch] = norm(hidden[start : start + batch].to(self.device))
        return hidden

    def last_norm(self) -> nn.Module:
        """The decoder's last norm, filled from disk."""
        return self._fill(self.family.parts.norm)

    def _fill(self, part: str) -> nn.Module:
        """A module of the decoder beside its layers, filled from disk."""
        module = self.text.get_submodule(part)
        for key, _ in list(module.named_parameters()):
            inner, _, name = key.rpartition(".")
            value = self.reader.tensor(f"{self.family.root}.{part}.{key}", self.dtype)
            assign(module.get_submodule(inner), name, value)
        return module

    @torch.no_grad()
    def head(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits of normed hidden states [T, hidden] into `out` [T, vocab] float32 on the stream's device, by blocks
        of the vocabulary; capped or scaled where the stock model does so."""
        name = self.family.head_tensor(self.reader.header)
        rows, columns = self.reader.spec(name).shape
        step = vocab_rows(columns)
        wide = hidden.to(self.device).float()  # logits in float32: rounded to bfloat16 they would blur a KL divergence
        for start in range(0, rows, step):
            block = self.reader.rows(name, slice(start, start + step), torch.float32)
            self.output(wide, block, out[:, start : start + len(block)], start)
        return out

    def output(self, hidden: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, start: int) -> None:
        """Into `out` [T, n] what the stock model's own forward gives for hidden states [T, hidden], `rows` [n, hidden]
        being its output matrix from row `start` on."""
        matrix = self.model.get_submodule(self.family.head)
        bias = None
        if getattr(matrix, "bias", None) is not None:
            bias = self.reader.rows(f"{self.family.head}.bias", slice(start, start + len(rows)), torch.float32)

        def head(read: torch.Tensor) -> torch.Tensor:
            found = torch.mm(read[0], rows.T, out=out)
            return (found if bias is None else found.add_(bias))[None]

        decoder = self.model.get_submodule(self.family.text.partition(".")[0])
        given = hidden[None]
        with (
            forward_of(decoder, lambda *_, **__: Last((given,))),
            forward_of(matrix, head),
        ):
            found: torch.Tensor = self.model(inputs_embeds=given, use_cache=False).logits[0]
        if found.data_ptr() != out.data_ptr():  # capped or scaled
            out.copy_(found)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [B, L, vocab] of a few windows: for probes and checks, not for corpora."""
        return self.head_logits(self.hidden(ids))

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [B, L, vocab] of normed hidden states [B, L, hidden], on the stream's device."""
        vocab = self.reader.spec(self.family.head_tensor(self.reader.header)).shape[0]
        out = torch.empty(hidden.shape[0] * hidden.shape[1], vocab, dtype=torch.float32, device=self.device)
        return self.head(hidden.flatten(0, 1), out).view(*hidden.shape[:2], vocab)
