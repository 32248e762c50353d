"""`self`: text that a model samples from itself, as token ids.

Stock transformers holds the model whole and generates in batches with its KV cache. Each window begins with one random
word; temperature 1 and top-p 0.95 go on from it. The same seed and threads give the same ids on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import Header, read_header, read_json
from compress.checkpoint.stock import load_stock
from compress.data.quiet import quiet
from compress.errors import UserError
from compress.machine import Progress, cpu_precision, return_freed_memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TEMPERATURE, TOP_P = 1.0, 0.95
BATCH = 32  # windows that grow together; fixed, because what is drawn depends on it


def sampling_dtype(header: Header) -> str:
    """BF16 where the weights are and the processor multiplies it, else F32."""
    return "BF16" if header.dtype == "BF16" and cpu_precision().native else "F32"


def sampling_memory(header: Header, layers: int, kv_width: int, vocab: int, samples: int, length: int) -> int:
    """Estimated peak bytes of sampling: all weights, one batch's keys and values, and its logits while they are sorted.

    `kv_width`: KV heads times their dimension.
    """
    dtype = sampling_dtype(header)
    each = 2 if dtype == "BF16" else 4
    weights = each * sum(spec.parameters for spec in header.tensors.values())
    cast = 0 if dtype == header.dtype else header.nbytes  # the file's own pages, while they are converted
    rows = min(samples, BATCH)
    cache = each * 2 * layers * kv_width * rows * length
    logits = rows * vocab * (5 * 4 + 8)  # float32 logits, sorted, softmax, cumulated, scattered back; int64 order
    return weights + cast + cache + logits + 128 * 2**20  # stock classes and tokenizer, loaded on first use


def sample(
    folder: Path, tokenizer: Any, samples: int, length: int, seed: int, progress: Progress
) -> npt.NDArray[np.int64]:
    """`samples` windows of `length` token ids, int64 [samples, length], written by the model in `folder`.

    What a default call of the tokenizer puts before a text stands before every window and is no part of it. An
    end-of-sequence token does not end a window: as in windows of text, another document follows. Ids that no text has
    (of images, or above the tokenizer's) are never drawn. Raises UserError for weights that do not load or give NaN.
    """
    import numpy as np
    import torch
    import transformers.utils.logging

    words = _words(tokenizer)
    draw = np.random.Generator(np.random.PCG64(seed))
    first = draw.choice(words, size=samples, replace=samples > len(words))
    before = np.asarray(tokenizer("")["input_ids"], dtype=np.int64)
    prompts = np.concatenate([np.tile(before, (samples, 1)), first[:, None]], axis=1)
    found = []
    with quiet(transformers.utils.logging), torch.random.fork_rng(devices=[]):
        model = _load(folder, tokenizer, length)
        with progress.task(
            "sampling text from the model, tokens a window", -(-samples // BATCH) * (length - 1)
        ) as task:
            for start in range(0, samples, BATCH):
                torch.manual_seed(int(draw.integers(2**63)))
                ids = torch.from_numpy(prompts[start : start + BATCH])
                found.append(_generate(model, ids, folder, task.advance))
        del model
    return_freed_memory()
    return np.concatenate(found)[:, len(before) :]


def _words(tokenizer: Any) -> npt.NDArray[np.int64]:
    """Ids of ordinary tokens that are words or the beginnings of words: letters alone, in any script."""
    import numpy as np

    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    ordinary = [id for id in range(len(tokenizer)) if id not in special]
    texts = tokenizer.batch_decode([[id] for id in ordinary])
    words = [id for id, text in zip(ordinary, texts, strict=True) if text.strip().isalpha()]
    return np.asarray(words or ordinary, dtype=np.int64)


def _load(folder: Path, tokenizer: Any, length: int) -> Any:
    """The stock model that config.json names, whole, with what it is to draw as its own generation config."""
    import torch
    import transformers

    config = read_json(folder / "config.json")
    dtype = torch.bfloat16 if sampling_dtype(read_header(folder)) == "BF16" else torch.float32
    model = load_stock(folder, dtype)
    never = sorted({*_not_text(config), *range(len(tokenizer), _vocabulary(config))})
    # not the folder's generation_config.json (top-k, penalties, where to stop): what is drawn is the model's own
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=length - 1,
        suppress_tokens=never or None,
        use_cache=True,
    )
    return model


def _generate(model: Any, ids: Any, folder: Path, advance: Any) -> npt.NDArray[np.int64]:
    """Prompts [B, P] continued by the model: [B, P + length - 1]. `advance` is called once a token."""
    import torch
    from transformers import StoppingCriteria

    class Told(StoppingCriteria):
        """Stops nothing; called after every token."""

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            advance()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[Told()])
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"{folder}: no text can be sampled from it, its logits are NaN or infinite") from None
    result: npt.NDArray[np.int64] = made.numpy()
    return result


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
