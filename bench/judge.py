"""Independent judge of a checkpoint: stock transformers only, nothing of the package. Windows of 512, evenly spaced.

    .venv/bin/python bench/judge.py FOLDER TEXT [--windows 64] [--ref FOLDER]

One JSON line: ppl, params, window_nll; with --ref also ref_ppl, ratio, kl (nats a token, ref to folder), top1
(agreement), window_kl. Fails on missing, unexpected or mismatched keys. The other scripts call `judge` on models in
memory.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512
BATCH = 4  # windows whose logits are alive at once: 4 x 512 x 49,152 float32 = 400 MB a model


def load(folder: Path | str, dtype: str = "auto") -> Any:
    """The stock model of `folder`, in eval mode, in the dtype it is stored in or in `dtype`. Where layers differ in
    width, the folder's own code builds it, as for any user (docs/families.md)."""
    trusted = (Path(folder) / "modeling_per_layer.py").is_file()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trusted, output_loading_info=True
    )
    model, info = loaded
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


def evenly_spaced(folder: Path | str, text: str, windows: int) -> torch.Tensor:
    """Windows [N, 512] of the text's tokens, evenly spaced over it, with the tokenizer of `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    count = len(ids) // LENGTH
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a window of {LENGTH}")
    rows: torch.Tensor = ids[: count * LENGTH].view(count, LENGTH)
    return rows[torch.linspace(0, count - 1, min(windows, count)).long()]


@torch.no_grad()
def judge(model: Any, rows: torch.Tensor, reference: Any = None) -> dict[str, Any]:
    """Perplexity over all predicted tokens of `rows` [N, L], and the distance from `reference`; keys as the script
    prints. `window_nll`, `window_kl`: the same window by window, [N] in nats a token."""
    nll: list[float] = []  # sums over a window's tokens
    kl: list[float] = []
    reference_nll = agree = 0.0
    for batch in rows.split(BATCH):
        target = batch[:, 1:, None]
        p = _log_probabilities(model, batch)
        nll += (-p.gather(-1, target).sum(dim=(1, 2))).tolist()
        if reference is not None:
            q = _log_probabilities(reference, batch)
            reference_nll -= q.gather(-1, target).sum().item()
            kl += (q.exp() * (q - p)).sum(dim=(1, 2)).tolist()
            agree += (q.argmax(-1) == p.argmax(-1)).sum().item()
    length = rows.shape[1] - 1
    tokens = rows.shape[0] * length
    found: dict[str, Any] = {
        "ppl": math.exp(sum(nll) / tokens),
        "params": sum(value.numel() for value in model.parameters()),
        "window_nll": [round(value / length, 7) for value in nll],
    }
    if reference is not None:
        found |= {
            "ref_ppl": math.exp(reference_nll / tokens),
            "ratio": math.exp((sum(nll) - reference_nll) / tokens),
            "kl": sum(kl) / tokens,
            "top1": agree / tokens,
            "window_kl": [round(value / length, 7) for value in kl],
        }
    return found


def _log_probabilities(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(batch).logits[:, :-1]
    return logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ref", type=Path, help="folder of the model to compare with")
    given = parser.parse_args()
    if given.text is None:
        parser.print_help()  # `make bench` starts every script; this one measures on demand only
        return
    rows = evenly_spaced(given.folder, given.text.read_text(encoding="utf-8"), given.windows)
    reference = None if given.ref is None else load(given.ref)
    print(json.dumps(judge(load(given.folder), rows, reference)))


if __name__ == "__main__":
    main()
