"""`self`: text that a model samples from itself, as token ids.

Stock transformers holds the model whole and generates in batches with a static KV cache. Each window begins with one
random word; temperature 1 and top-p 0.95 go on from it. The same seed and threads give the same ids on the same
machine, and they are drawn once: what a model wrote is kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.demo import cache_folder
from compress.checkpoint.digests import digest
from compress.checkpoint.headers import Header, read_header, read_json
from compress.checkpoint.stock import load_stock
from compress.data.quiet import quiet
from compress.errors import UserError
from compress.machine import Progress, cpu_precision, return_freed_memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

TEMPERATURE, TOP_P = 1.0, 0.95
BATCH = 64  # windows that grow together; fixed, because what is drawn depends on it
SAMPLER = 2  # counts the ways in which ids were drawn: it is part of the cache's key


def sampling_dtype(header: Header) -> str:
    """BF16 where the weights are and the processor multiplies it, else F32."""
    return "BF16" if header.dtype == "BF16" and cpu_precision().native else "F32"


def sampling_memory(header: Header, layers: int, kv_width: int, vocab: int, samples: int, length: int) -> int:
    """Estimated peak bytes of sampling: all weights, one batch's keys and values, and its logits while one is drawn.

    `kv_width`: KV heads times their dimension.
    """
    dtype = sampling_dtype(header)
    each = 2 if dtype == "BF16" else 4
    weights = each * sum(spec.parameters for spec in header.tensors.values())
    cast = 0 if dtype == header.dtype else header.nbytes  # the file's own pages, while they are converted
    rows = min(samples, BATCH)
    cache = each * 2 * layers * kv_width * rows * length
    logits = rows * vocab * 7 * 4  # float32: as they come, masked, softmax, its sum, what is left, compared, scattered
    return weights + cast + cache + logits + 128 * 2**20  # stock classes and tokenizer, loaded on first use


def sample(
    folder: Path, tokenizer: Any, samples: int, length: int, seed: int, progress: Progress
) -> npt.NDArray[np.int64]:
    """`samples` windows of `length` token ids, int64 [samples, length], written by the model in `folder`.

    What a default call of the tokenizer puts before a text stands before every window and is no part of it. An
    end-of-sequence token does not end a window: as in windows of text, another document follows. Ids that no text has
    (of images, or above the tokenizer's) are never drawn. What was drawn once from the same files is read again from
    the cache. Raises UserError for weights that do not load or give NaN.
    """
    begun = _begun(folder, tokenizer)
    kept = cache_folder() / "sampled" / f"{_key(folder, begun, samples, length, seed)}.npy"
    found = _kept(kept, (samples, length))
    if found is None:
        found = _drawn(folder, begun, samples, length, seed, progress)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            _keep(kept, found)
    return found


@dataclass(frozen=True)
class _Begun:
    """What the tokenizer has to say: the ids that stand `before` every text, the `words` one of which begins a window,
    and the ids that are `never` drawn; int64, one axis each."""

    before: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    never: npt.NDArray[np.int64]


def _begun(folder: Path, tokenizer: Any) -> _Begun:
    import numpy as np

    before = np.asarray(tokenizer("")["input_ids"], dtype=np.int64)
    words = _words(tokenizer, _vocabulary(read_json(folder / "config.json")) or len(tokenizer))
    return _Begun(before, words, np.asarray(_never(folder, tokenizer), dtype=np.int64))


def _key(folder: Path, begun: _Begun, samples: int, length: int, seed: int) -> str:
    """Of all that the ids depend on: the model by its bytes, what the tokenizer says (which need not be the one in its
    folder), what is asked for, and what computes it."""
    import torch
    import transformers

    files = sorted({path for pattern in ("config.json", "*.safetensors") for path in folder.glob(pattern)})
    said = [hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() for ids in (begun.before, begun.words, begun.never)]
    asked = [samples, length, seed, SAMPLER, TEMPERATURE, TOP_P, BATCH]
    computed = [torch.get_num_threads(), torch.__version__, transformers.__version__, cpu_precision().reason]
    key = json.dumps([[(file.name, digest(file)) for file in files], said, asked, computed])
    return hashlib.sha256(key.encode()).hexdigest()


def _kept(file: Path, shape: tuple[int, int]) -> npt.NDArray[np.int64] | None:
    import numpy as np

    try:
        found: npt.NDArray[np.int64] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.int64 else None


def _keep(file: Path, ids: npt.NDArray[np.int64]) -> None:
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
        np.save(partial, ids, allow_pickle=False)
    os.replace(partial.name, file)


def _drawn(
    folder: Path, begun: _Begun, samples: int, length: int, seed: int, progress: Progress
) -> npt.NDArray[np.int64]:
    import numpy as np
    import torch
    import transformers.utils.logging

    draw = np.random.Generator(np.random.PCG64(seed))
    first = draw.choice(begun.words, size=samples, replace=samples > len(begun.words))
    prompts = np.concatenate([np.tile(begun.before, (samples, 1)), first[:, None]], axis=1)
    found = []
    with quiet(transformers.utils.logging), torch.random.fork_rng(devices=[]):
        model = _load(folder, length)
        label = "sampling text from the model, tokens a window"
        with progress.task(label, -(-samples // BATCH) * (length - 1)) as task:
            for start in range(0, samples, BATCH):
                torch.manual_seed(int(draw.integers(2**63)))
                nucleus = _Nucleus(begun.never, folder, task.advance)
                ids = torch.from_numpy(prompts[start : start + BATCH])
                made = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[nucleus])
                found.append(made.numpy())
        del model
    return_freed_memory()
    return np.concatenate(found)[:, len(begun.before) :]


def _words(tokenizer: Any, vocabulary: int) -> npt.NDArray[np.int64]:
    """Ids below `vocabulary` of ordinary tokens that are words or the beginnings of words: letters alone, in any
    script."""
    import numpy as np

    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    ordinary = [id for id in range(min(len(tokenizer), vocabulary)) if id not in special]
    texts = tokenizer.batch_decode([[id] for id in ordinary])
    words = [id for id, text in zip(ordinary, texts, strict=True) if text.strip().isalpha()]
    return np.asarray(words or ordinary, dtype=np.int64)


def _load(folder: Path, length: int) -> Any:
    """The stock model that config.json names, whole, with what it is to do as its own generation config."""
    import torch
    import transformers

    dtype = torch.bfloat16 if sampling_dtype(read_header(folder)) == "BF16" else torch.float32
    model = load_stock(folder, dtype)
    # not the folder's generation_config.json (top-k, penalties, where to stop): what is drawn is the model's own; and
    # greedy, because `_Nucleus` leaves nothing but the token that it has drawn
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=length - 1, use_cache=True, cache_implementation="static", disable_compile=True
    )
    return model


class _Nucleus:
    """A logits processor that draws a token from the nucleus (Holtzman et al. 2020, arXiv:1904.09751) without sorting.

    A token is drawn from the whole distribution, and again while the tokens likelier than it make TOP_P or more: what
    stays is distributed as in the nucleus. A pass over the vocabulary tells; sorting it costs more than the model.
    """

    def __init__(self, never: npt.NDArray[np.int64], folder: Path, advance: Callable[[], None]) -> None:
        import torch

        self._never, self._folder, self._advance = torch.from_numpy(never), folder, advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocab] that are 0 at one token a row and -inf at all others."""
        import torch

        del input_ids
        never = self._never[self._never < scores.shape[1]]  # a config may name ids that its own vocabulary lacks
        scores = scores.float().index_fill(1, never, -torch.inf) / TEMPERATURE
        likely = scores.softmax(-1)
        total = likely.cumsum(-1)
        if not bool(torch.isfinite(total[:, -1]).all()):
            raise UserError(f"{self._folder}: no text can be sampled from it, its logits are NaN or infinite")
        drawn = torch.empty(len(scores), 1, dtype=torch.int64)
        left = torch.arange(len(scores))
        while len(left):
            end = total[left, -1:]
            # the last step of the sum may be rounded to nothing: stay below it, or what is never drawn would be
            at = (torch.rand(len(left), 1) * end).minimum(end * (1 - 1e-6))
            drawn[left] = torch.searchsorted(total[left], at, right=True)
            own = likely[left].gather(1, drawn[left])
            above = likely[left].where(likely[left] > own, 0.0).sum(-1)
            left = left[above >= TOP_P]
        self._advance()
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _never(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that no text has: of images and videos, and above the tokenizer's."""
    config = read_json(folder / "config.json")
    return sorted({*_not_text(config), *range(len(tokenizer), _vocabulary(config))})


def _not_text(config: Mapping[str, Any]) -> Iterator[int]:
    """Ids that a config.json gives to what is not text, at any depth: `image_token_id`, `video_start_token_id` ..."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _not_text(value)
        elif key.endswith("_token_id") and key.startswith(("image", "video", "vision", "audio")) and type(value) is int:
            yield value


def _vocabulary(config: Mapping[str, Any]) -> int:
    nested = config.get("text_config")
    size = (nested if isinstance(nested, Mapping) else config).get("vocab_size", 0)
    return size if isinstance(size, int) else 0
