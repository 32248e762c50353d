"""The model card (README.md) of a result, from its receipt: what it is made of, what was done, what it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.headers import read_json


def model_card(receipt: dict[str, Any], source: Path) -> str:
    """Markdown with the hub's YAML front matter. `source`: the base model's folder, for its licence."""
    base = receipt["model"]["name"]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["autoglm-compress", "compressed"]}
    if "/" in base and ":" not in base.split("@")[0]:
        front["base_model"] = base.split("@")[0]
    licence = base_licence(source)
    front |= licence
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {base}, compressed",
        "",
        f"Made from `{base}` by [autoglm-compress](recipe.yaml) {receipt['autoglm_compress']}. "
        f"The licence of the base model applies ({licence.get('license', 'see its files')}).",
        "",
        "| step | what | parameters | bytes |",
        "|---|---|---:|---:|",
    ]
    for step in receipt["steps"]:
        options = ", ".join(f"{k} {v}" for k, v in step["options"].items() if v is not None)
        lines.append(f"| {step['step']} | {options} | {step['parameters']:,} | {step['bytes']:,} |")
    lines += ["", *_quality(receipt), *_how(source)]
    return "\n".join(lines) + "\n"


def base_licence(source: Path) -> dict[str, str]:
    """`license` (and `license_name`, `license_link`) of the base model's card, where it has one."""
    card = source / "README.md"
    if not card.exists():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        front = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    if not isinstance(front, dict):
        return {}
    return {k: str(front[k]) for k in ("license", "license_name", "license_link") if front.get(k)}


def _quality(receipt: dict[str, Any]) -> list[str]:
    if not receipt["stages"]:
        return ["Its quality was not measured.", ""]
    data = receipt["recipe"]["data"]["evaluation"]["source"]
    rows = [
        f"Measured on `{data}` (when `builtin`: disjoint from calibration and training), against the base model:",
        "",
        "| stage | perplexity | ratio | KL (nats) | top-1 agreement |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in receipt["stages"]:
        rows.append(
            f"| {row['stage']} | {row['perplexity']:.3f} | {row['perplexity_ratio']:.3f} | {row['kl']:.4f} "
            f"| {row['top1_agreement']:.2%} |"
        )
    return [*rows, ""]


def _how(source: Path) -> list[str]:
    multimodal = "vision_config" in read_json(source / "config.json")
    architecture = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    return [
        "```python",
        f"from transformers import {architecture}, AutoTokenizer",
        "",
        f'model = {architecture}.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
        "",
        "`recipe.yaml` repeats the run; `receipt.json` holds digests, options, seeds and metrics.",
    ]
