"""Windows of tokens: every source through the tokenizer of a folder, cut, chosen, and mixed by share.

Consecutive, disjoint windows; the same source, length, samples and seed give the same ones, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.digests import digest
from compress.checkpoint.headers import read_json
from compress.data.chat import Chat, Document, render
from compress.data.images import Picture
from compress.data.kinds import TEXT, characters, check_offsets, count_of, of_tokens
from compress.data.packed import marks, pack
from compress.data.sample import TEMPERATURE, TOP_P, sample
from compress.data.sources import check_self, hub_limit, no_images, read
from compress.data.spec import SELF, DataSpec, Part, counts
from compress.errors import UserError
from compress.machine import Progress, Silent

if TYPE_CHECKING:  # numpy is a fifth of what --help takes: it is imported where there are tokens
    import numpy as np
    import numpy.typing as npt

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, eq=False)
class Tokens:
    """`ids`: int64 windows [N, length]. `digest`: sha256 of the text (of the ids, where a model sampled them; of the
    digests, where there are several sources). `tokens`: of the whole text, before windows were chosen. `note`: one line
    on what was taken from where. `revisions`: the commits of hub datasets, by source. `kinds`: what each token is, [N,
    length], codes of TOKEN_KINDS; None where nobody asked and no window has images. `images`: of each window, in the
    order of their tokens; empty where no window has any."""

    ids: npt.NDArray[np.int64]
    digest: str
    tokens: int
    note: str
    revisions: Mapping[str, str] = field(default_factory=dict)
    kinds: npt.NDArray[np.int8] | None = None
    images: tuple[tuple[Picture, ...], ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """What a receipt says of the text: `digest`; `revisions`, and tokens of each kind, where there are any."""
        found: dict[str, Any] = {"digest": self.digest}
        found |= {"revisions": dict(self.revisions)} if self.revisions else {}
        return found if self.kinds is None else found | {"kinds": count_of(self.kinds)}


def windows(
    spec: DataSpec,
    part: Part,
    folder: Path,
    seed: int,
    *,
    model: Path | None = None,
    kinds: bool = False,
    images: bool = False,
    progress: Progress | None = None,
) -> Tokens:
    """Windows of `spec.length` tokens of the tokenizer in `folder`: consecutive, disjoint, the rest is dropped.

    Evaluation takes `samples` of them evenly spaced, in order, from the tokenizer's default call; calibration and
    training a seeded choice without replacement, in seeded order, without the special tokens of a default call.
    `self` is sampled from the checkpoint in `model`, by default `folder`. Of several sources each gives the number of
    windows that its share is (`counts`), in seeded order together, for evaluation one source after the other.

    Raises UserError for what `check` refuses, for a folder without a tokenizer, for fewer windows than `samples`,
    and for token ids outside the vocabulary of the folder's config.json; MachineError as `check`.
    """
    import numpy as np

    tokenizer = tokenizer_of(folder)
    if kinds:
        check_offsets(tokenizer, folder)
    maker = _Maker(spec.length, part, seed, folder, model or folder, tokenizer, kinds, images, progress or Silent())
    found = [maker.windows(source, count) for source, count in counts(spec).items()]
    if len(found) == 1:
        return found[0]
    for source, tokens in zip(counts(spec), found, strict=True):
        if any(other.images for other in found) and not tokens.images and bool(marks(tokens.ids, folder).any()):
            raise UserError(f"{source}: a text holds the token that stands for an image, and shows none")
    ids = np.concatenate([tokens.ids for tokens in found])
    order = np.arange(len(ids))
    if part != "evaluation":
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(ids))
    told = None
    if any(tokens.kinds is not None for tokens in found):
        told = np.concatenate([_kinds_of(tokens) for tokens in found])[order]
    shown = [tokens.images or ((),) * len(tokens.ids) for tokens in found]
    pictures = tuple(window for each in shown for window in each) if any(tokens.images for tokens in found) else ()
    together = "\n".join(f"{tokens.digest} {len(tokens.ids)}" for tokens in found)
    return Tokens(
        ids[order],
        hashlib.sha256(together.encode()).hexdigest(),
        sum(tokens.tokens for tokens in found),
        "; ".join(tokens.note for tokens in found),
        {source: commit for tokens in found for source, commit in tokens.revisions.items()},
        told,
        tuple(pictures[index] for index in order) if pictures else (),
    )


@dataclass(frozen=True)
class _Maker:
    """Makes the windows of one source after the other; `folder` is the tokenizer's, `model` writes `self`."""

    length: int
    part: Part
    seed: int
    folder: Path
    model: Path
    tokenizer: Any
    kinds: bool
    images: bool
    progress: Progress

    def windows(self, source: str, samples: int | None) -> Tokens:
        """`samples` windows of a source, None = all that there are."""
        if source == SELF:
            return self._sampled(check_self(samples, self.part))
        text = read(source, self.part, hub_limit(samples, self.length), self.progress)
        texts = [d if isinstance(d, str) else render(d, self.tokenizer, self.folder) for d in text.documents]
        if shown := [d for d in text.documents if isinstance(d, Chat) and d.images]:
            if not self.images:
                raise no_images(shown[0])
            return self._packed(source, text.documents, texts, samples or 1)
        # a chat template writes the special tokens that a text begins with
        special = self.part == "evaluation" and all(isinstance(d, str) for d in text.documents)
        stream, kinds = self._encode(texts, special, text.documents)
        chosen, how = self._chosen(source, len(stream), samples)
        _check_vocabulary(stream, self.folder)
        origin = source if text.revision is None else f"{source} at {text.revision[:12]}"
        tokens = f"{len(stream)} tokens" if text.whole else f"{len(stream)} tokens from its beginning"
        note = f"{self.part}: {len(chosen)} of {how}, from {origin} ({tokens})"
        revisions = {} if text.revision is None else {source: text.revision}
        told = None if kinds is None else self._cut(kinds)[chosen]
        return Tokens(self._cut(stream)[chosen], _digest(texts), len(stream), note, revisions, told)

    def _cut(self, stream: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[tokens] -> [windows, length]"""
        return stream[: len(stream) // self.length * self.length].reshape(-1, self.length)

    def _encode(
        self, texts: Sequence[str], special: bool, documents: Sequence[Document]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8] | None]:
        """One stream of token ids, documents joined by the tokenizer's end-of-sequence token; and the kind of each."""
        import numpy as np

        tokenizer = self.tokenizer
        if len(texts) > 1 and not isinstance(tokenizer.eos_token, str):
            said = f"{self.folder}: the tokenizer has no eos_token to put between documents"
            raise UserError(said, hint="use a .txt file")
        between = (tokenizer.eos_token or "") if len(texts) > 1 else ""
        how = {"return_offsets_mapping": True} if self.kinds else {}
        found = tokenizer(between.join(texts), add_special_tokens=special, verbose=False, **how)
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        if not self.kinds:
            return ids, None
        kinds = characters(documents, texts, between, tokenizer, self.folder)
        return ids, of_tokens(kinds, found["offset_mapping"])

    def _chosen(self, source: str, tokens: int, samples: int | None) -> tuple[npt.NDArray[np.int64], str]:
        """Which of the windows in a stream of `tokens` are taken, and in words out of which and how."""
        import numpy as np

        count, need = tokens // self.length, samples or 1
        if count < need:
            raise UserError(
                f"{source}: {tokens} tokens of {self.part} text make {count} windows of {self.length}, needed {need}",
                hint="use a longer text, fewer samples or a shorter length",
            )
        taken = samples or count
        if self.part == "evaluation":
            return evenly_spaced(count, taken), f"{count} windows x {self.length} tokens, evenly spaced"
        chosen = np.random.Generator(np.random.PCG64(self.seed)).permutation(count)[:taken]
        return chosen, f"{count} windows x {self.length} tokens, chosen with seed {self.seed}"

    def _packed(self, source: str, documents: Sequence[Document], texts: Sequence[str], samples: int) -> Tokens:
        """Windows of whole documents, some of which show images."""
        import numpy as np

        made = pack(documents, texts, self.tokenizer, self.folder, self.length, self.kinds)
        count = len(made.ids)
        if count < samples:
            raise UserError(
                f"{source}: {len(documents)} documents fill {count} windows of {self.length}, needed {samples}",
                hint="more conversations, fewer samples or a shorter length",
            )
        _check_vocabulary(made.ids, self.folder)
        chosen = np.random.Generator(np.random.PCG64(self.seed)).permutation(count)[:samples]
        kinds = made.kinds[chosen]
        said = ", ".join(f"{n} {name}" for name, n in count_of(kinds).items())
        note = (
            f"{self.part}: {samples} of {count} windows x {self.length} tokens, whole documents with their images, "
            f"chosen with seed {self.seed}, from {source} ({said})"
        )
        images = tuple(made.images[index] for index in chosen)
        shown = _digest([*texts, *(digest(image.path) for window in made.images for image in window)])
        return Tokens(made.ids[chosen], shown, made.tokens, note, kinds=kinds, images=images)

    def _sampled(self, samples: int) -> Tokens:
        import numpy as np

        ids = sample(self.model, self.tokenizer, samples, self.length, self.seed, self.progress)
        note = (
            f"{self.part}: {samples} windows x {self.length} tokens sampled by the model itself with seed {self.seed} "
            f"(temperature {TEMPERATURE:g}, top-p {TOP_P:g})"
        )
        kinds = np.full(ids.shape, TEXT, dtype=np.int8) if self.kinds else None
        return Tokens(ids, hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(), ids.size, note, kinds=kinds)


def evenly_spaced(count: int, taken: int) -> npt.NDArray[np.int64]:
    """`taken` of `range(count)`, as `torch.linspace(0, count - 1, taken).long()` picks them.

    In float32 and from both ends towards the middle, as torch computes it: where a step is a whole number, float64
    would truncate to another row.
    """
    import numpy as np

    index = np.arange(taken, dtype=np.float32)
    step = np.float32(count - 1) / np.float32(max(taken - 1, 1))
    from_end = np.float32(count - 1) - step * index[::-1]
    picked = np.where(index < taken // 2, step * index, from_end)
    return picked.astype(np.int64) if taken > 1 else np.zeros(1, np.int64)


def _kinds_of(tokens: Tokens) -> npt.NDArray[np.int8]:
    """The kinds of a source whose tokens nobody had to tell apart: text."""
    import numpy as np

    return np.full(tokens.ids.shape, TEXT, dtype=np.int8) if tokens.kinds is None else tokens.kinds


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(b"\0".join(text.encode() for text in texts)).hexdigest()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder; UserError where there is none, or none that loads."""
    # asked first: AutoTokenizer builds an empty tokenizer for some model types whose files are missing
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{folder}: no tokenizer ({TOKENIZERS[0]}); text cannot be turned into tokens")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise anything down there, bare Exception from Rust included
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({line})") from None


def _check_vocabulary(stream: npt.NDArray[np.int64], folder: Path) -> None:
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    size = (nested if isinstance(nested, dict) else config).get("vocab_size")
    if isinstance(size, int) and int(stream.max()) >= size:
        raise UserError(f"{folder}: the tokenizer gives id {int(stream.max())}, config.json has vocab_size {size}")
