"""Multiple-choice accuracy of a dense model and of compressed folders, side by side, by lm-eval's own harness.

    pip install '.[lm-eval]'
    .venv/bin/python bench/multiple_choice.py --questions FILE.jsonl [--folders OUT ...] [--limit N]

FILE: one JSON object a line, {"question": text, "choices": [text, ...], "answer": index from 0, or the right choice's
text}. Nothing is fetched. Zero-shot, "Question: ...\\nAnswer: <choice>"; `acc` takes the choice of the greatest
likelihood, `acc_norm` that of the greatest likelihood a byte, as lm-eval defines them. Skipped without lm-eval or FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _results import Results, options, say

from compress.checkpoint.source import locate
from compress.machine import Machine

TASK = "local_multiple_choice"
METRICS = ("acc", "acc_norm")


def questions(file: Path) -> list[dict[str, Any]]:
    """What `file` asks, `answer` as an index; SystemExit names the line that is none."""
    asked = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            question, choices, answer = (found[key] for key in ("question", "choices", "answer"))
            index = choices.index(answer) if isinstance(answer, str) else answer
            sound = isinstance(question, str) and all(isinstance(each, str) for each in choices)
            if not sound or type(index) is not int or not 0 <= index < len(choices):
                raise ValueError("a text, a list of texts, and the index of one of them or its text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"{file}, line {number}: question, choices and answer are wanted: {error}") from error
        asked.append({"question": question, "choices": choices, "answer": index})
    if not asked:
        raise SystemExit(f"{file}: no question in it")
    return asked


def accuracy(folder: Path, asked: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """lm-eval's metrics of the stock model in `folder` on these questions, each with its standard error."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    trusted = (folder / "modeling_per_layer.py").is_file()  # layers that differ in width bring their own class
    model = HFLM(pretrained=str(folder), dtype="auto", device="cpu", batch_size=batch, trust_remote_code=trusted)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "questions.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in asked), encoding="utf-8")
        task = {
            "task": TASK,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": scratch},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        }
        found = simple_evaluate(model=model, tasks=[task], num_fewshot=0)
    results = found["results"][TASK]
    return {name: {"value": results[f"{name},none"], "error": results[f"{name}_stderr,none"]} for name in METRICS}


def main() -> None:
    given = _arguments()
    if find_spec("lm_eval") is None:
        say("skipped: lm-eval is not installed; pip install '.[lm-eval]'")
        return
    if given.questions is None:
        say("skipped: no file of questions was named; --questions FILE.jsonl")
        return
    import torch

    torch.set_num_threads(given.threads)
    asked = questions(given.questions)[: given.limit]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    results = Results("multiple_choice", given.results)
    for model in (given.model, *given.folders):
        key = {"model": model, "questions": len(asked), "file": given.questions.name, "sha256": digest}
        found = None if given.again else results.find(key)
        if found is None:
            found = accuracy(locate(model).folder, asked, given.batch)
            results.add(key, found)
        values = "  ".join(f"{name} {each['value']:.3f} +- {each['error']:.3f}" for name, each in found.items())
        say(f"{model:40} {values}  {len(asked)} questions")


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m", help="the dense model")
    parser.add_argument("--folders", nargs="*", default=[], metavar="FOLDER", help="compressed models of it")
    parser.add_argument("--questions", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=Machine.detect().threads)
    return parser.parse_args()


if __name__ == "__main__":
    main()
