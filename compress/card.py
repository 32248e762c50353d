"""The model card (README.md) of a result, from its receipt: what it is made of, what was done, what it kept.

A result that failed its gates says so before anything else, and the Python that it shows runs as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compress.arch import described
from compress.checkpoint.demo import DEMOS
from compress.checkpoint.headers import read_json
from compress.checkpoint.per_layer import FILE, is_per_layer
from compress.data import has_template
from compress.formats import format_named
from compress.steps import STEPS

REMOTE = (
    f"**It needs `trust_remote_code=True`**: its layers differ in width, and `{FILE}` in this folder (read it: it is "
    "short) builds them from the stock classes of transformers."
)
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def model_card(receipt: dict[str, Any], source: Path) -> str:
    """Markdown with the hub's YAML front matter. `source`: the base model's folder, for what its own card says."""
    base = receipt["model"]["name"]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["autoglm-compress", "compressed"]}
    said = _front_matter(source / "README.md")
    licence = {k: str(said[k]) for k in ("license", "license_name", "license_link") if said.get(k)}
    front |= licence
    repository = base.split("@")[0]
    known = repository if "/" in base and ":" not in repository else _hub_ids(said.get("base_model"))
    whose = "base model"
    if known:
        front["base_model"] = known
        names = ", ".join([known] if isinstance(known, str) else known)
        whose = whose if known == repository else f"base model ({names})"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {base}, compressed",
        "",
        *_rejection(receipt),
        f"Made from `{base}` by autoglm-compress {receipt['autoglm_compress']} with [this recipe](recipe.yaml). "
        f"The licence of the {whose} applies ({licence.get('license', 'see its files')}).",
        "",
        *_dequantized(base),
        "| step | what | parameters | bytes |",
        "|---|---|---:|---:|",
    ]
    for step in receipt["steps"]:
        lines.append(f"| {step['step']} | {_what(step)} | {step['parameters']:,} | {step['bytes']:,} |")
    lines += ["", *_depth(receipt), *_quality(receipt), *_how(receipt, source)]
    return "\n".join(lines) + "\n"


def _what(step: Mapping[str, Any]) -> str:
    """What a step changed, and the options that are not the defaults."""
    fields = STEPS[step["step"].partition("-")[2]].options.model_fields
    given = [
        f"{key} {value}"
        for key, value in step["options"].items()
        if value is not None and (key not in fields or fields[key].is_required() or value != fields[key].get_default())
    ]
    told = ", ".join(given)
    return told if step["changes"] == told else f"{step['changes']}{f'; {told}' if told else ''}"


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the two lines `---` that open a card; empty where there is none or it is broken."""
    if not card.is_file():
        return {}
    lines = card.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((at for at, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    try:
        front = yaml.safe_load("\n".join(lines[1:end])) if end else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        return {}
    return front if isinstance(front, dict) else {}


def _hub_ids(said: object) -> str | list[str] | None:
    """`base_model` as a card says it, when it is a hub id or a list of them: training tools write local paths too."""
    names = said if isinstance(said, list) else [said]
    if not names or not all(isinstance(name, str) and HUB_ID.fullmatch(name) for name in names):
        return None
    return said if isinstance(said, str) else [str(name) for name in names]


def _rejection(receipt: Mapping[str, Any]) -> list[str]:
    failed = (receipt.get("gates") or {}).get("failed")
    return ["**Rejected: this result failed its gates.**", "", *(f"- {line}" for line in failed), ""] if failed else []


def _dequantized(base: str) -> list[str]:
    """What a GGUF stands for: whoever reads a ratio takes it for one to the original weights otherwise."""
    kind, _, name = base.partition(":")
    demo = DEMOS.get(name) if kind == "demo" else None
    file = Path(demo.member).name if demo else base
    if not file.endswith(".gguf"):
        return []
    told = (
        f"The base model was itself read from the GGUF `{file}`, dequantized where that is quantized: every number "
        "here is against those weights, not against the original model's."
    )
    return [told, ""]


def _depth(receipt: Mapping[str, Any]) -> list[str]:
    """Which decoder layers went, what of the vision tower, and why those."""
    told = [
        f"{step['step']} removed the decoder layers {', '.join(map(str, step['layers']['gone']))} of its input's "
        f"{step['layers']['layers']}, counted from 0, by {step['layers']['criterion']} ({step['layers']['paper']})."
        for step in receipt["steps"]
        if "layers" in step
    ]
    told += [
        f"{step['step']} cut the vision tower: {'; '.join(_seen(step['vision']))}."
        for step in receipt["steps"]
        if "vision" in step
    ]
    return [*told, ""] if told else []


def _seen(vision: Mapping[str, Any]) -> list[str]:
    """What of a vision tower went, in words."""
    parts = []
    if (layers := vision.get("layers")) is not None:
        gone = ", ".join(map(str, layers["gone"]))
        parts.append(f"layers {gone} of its {layers['layers']} went, counted from 0, by {layers['criterion']}")
    if (ffn := vision.get("ffn")) is not None:
        parts.append(f"{ffn['keep']} of {ffn['units']} FFN neurons of its merger stay, by {ffn['criterion']}")
    return parts


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


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of stock transformers that loads a checkpoint of this config.json."""
    return "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"


def _how(receipt: dict[str, Any], source: Path) -> list[str]:
    config = read_json(source / "config.json")
    family = described(config)
    said: dict[str, Any] = {"stock_transformers": family.stock is None, "loaded_by": list(family.loaders_of(config))}
    for step in receipt["steps"]:  # a prune step may write another family than its input's
        said = step if "loaded_by" in step else said
    trusted = bool(said.get("trust_remote_code", is_per_layer(config)))
    last = "`recipe.yaml` repeats the run; `receipt.json` holds digests, options, seeds and metrics."
    if not said["stock_transformers"]:
        others = " and ".join(said["loaded_by"])
        return [f"Stock transformers does not load this folder; {others} loads it while it is unquantized.", "", last]
    formats = [step["options"]["format"] for step in receipt["steps"] if "format" in step["options"]]
    noisy = format_named(formats[-1]).noisy if formats else ""
    program = ["```python", *_python(auto_class(config), has_template(source), noisy, trusted), "```", ""]
    return [*([REMOTE, ""] if trusted else []), *program, last]


def _python(auto: str, chat: bool, noisy: str, trusted: bool) -> list[str]:
    """A program that prints an answer of the model; `noisy`: a logger that would print a line at every product;
    `trusted`: the folder's own code is needed."""
    quieted = [f'logging.getLogger("{noisy}").setLevel(logging.ERROR)  # it warns at every product', ""]
    ask = [
        'chat = [{"role": "user", "content": "What is the capital of France?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
    ]
    return [
        *(["import logging", ""] if noisy else []),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        *(quieted if noisy else []),
        'folder = "."  # where this file lies',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder{', trust_remote_code=True' if trusted else ''})",
        *(ask if chat else ['inputs = tokenizer("The capital of France is", return_tensors="pt")']),
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=64)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
