"""Checkpoints whose decoder layers differ in width: how config.json says it, and the file of code that loads them.

Stock transformers reads the key `per_layer_config`, but its models build every layer at the global sizes. So such a
folder holds modeling_per_layer.py, which replaces the layers; `source` writes it, byte for byte the same for every
model of one class. Only that text is ever executed: a folder with another one is refused. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError, did_you_mean

KEY = "per_layer_config"
ALLOW = "allow_global_per_layer_attribute_access"  # stock code reads the global sizes while it builds a model
FFN, HEADS = "intermediate_size", "num_attention_heads"
KEYS = (FFN, HEADS)  # the keys of a config that may differ by layer
NO_LAYERS = ("_token_id", "_ids", "_tokens", "architectures")  # lists that may be as long as a model is deep
FILE = "modeling_per_layer.py"
PREFIX = "PerLayer"
NOTE = "needs trust_remote_code=True, because layers differ in width"

# class -> the base model and the config of it, where their names do not follow from the class' own
NAMES = {"Gemma3ForCausalLM": ("Gemma3TextModel", "Gemma3TextConfig")}

TEMPLATE = '''\
"""{stock} with decoder layers that differ in width, as per_layer_config in config.json says.

Written by autoglm-compress. Every layer is the stock class, built from its own config.
"""

from transformers import {config}, {stock}, {base}


def _build_layers(model):
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = type(layer)(decoder.config.per_layer_config[index], index)
    model.post_init()


class {prefix}{config}({config}):
    pass


class {prefix}{base}({base}):
    config_class = {prefix}{config}

    def __init__(self, config):
        super().__init__(config)
        _build_layers(self)


class {prefix}{stock}({stock}):
    config_class = {prefix}{config}

    def __init__(self, config):
        super().__init__(config)
        _build_layers(self)
'''


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a raw config.json that describes the decoder."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def is_per_layer(config: Mapping[str, Any]) -> bool:
    """Whether layers of a checkpoint may differ: its raw config.json has `per_layer_config`."""
    return KEY in text_of(config)


def own_sizes(text: Mapping[str, Any], layers: int) -> dict[int, dict[str, int]]:
    """Layer -> config key -> its own value, from the decoder's config; empty where all layers are alike.

    UserError names a layer that is none, a key that may not differ, a value that is no positive whole number.
    """
    said = text.get(KEY)
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        raise UserError(f"config.json: {KEY} must be an object, found {type(said).__name__}")
    found: dict[int, dict[str, int]] = {}
    for name, own in said.items():
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and int(name) < layers):
            raise UserError(f"config.json: {KEY}: {name!r} is no layer, allowed: 0 to {layers - 1}")
        if not isinstance(own, Mapping):
            raise UserError(f"config.json: {KEY}: {name}: must be an object, found {type(own).__name__}")
        for key, value in own.items():
            if key not in KEYS:
                raise UserError(f"config.json: {KEY}: {name}: {key!r} may not differ{did_you_mean(key, KEYS)}")
            if type(value) is not int or value <= 0:
                raise UserError(f"config.json: {KEY}: {name}: {key} must be a positive whole number, found {value!r}")
        found[int(name)] = dict(own)
    return found


def with_layers(text: Mapping[str, Any], layers: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The decoder's config when layer i has the sizes layers[i], all the same keys: the largest of each is the global
    one, and what differs from it stands in `per_layer_config`; that key goes where nothing differs."""
    largest = {key: max(own[key] for own in layers) for key in layers[0]}
    said = {
        str(index): differing
        for index, own in enumerate(layers)
        if (differing := {key: value for key, value in own.items() if value != largest[key]})
    }
    new = {key: value for key, value in text.items() if key not in (KEY, ALLOW)} | largest
    return {**new, KEY: said, ALLOW: True} if said else new


def lists(text: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """What the decoder's config says of each layer by its place (`layer_types`, `no_rope_layers`): its lists of that
    length."""
    return {
        key: said
        for key, said in text.items()
        if isinstance(said, list) and len(said) == layers and not key.endswith(NO_LAYERS)
    }


def anchored(config: Mapping[str, Any]) -> int:
    """How many of the first layers must stay where they are, from the raw config.json: a qwen3_vl adds to the output of
    each of them what the vision tower gives at one of its `deepstack_visual_indexes`."""
    vision = config.get("vision_config")
    said = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    return len(said) if isinstance(said, list) else 0


def shallow(text: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """What `per_layer_config` says of the layers `layers`, counted anew, as a change of the decoder's config."""
    if not isinstance(text.get(KEY), Mapping):
        return {}
    said = text[KEY]
    return {KEY: {str(new): said[str(old)] for new, old in enumerate(layers) if str(old) in said}}


def stock_name(name: str) -> str:
    """The stock class behind a class name of `architectures`."""
    return name.removeprefix(PREFIX)


def marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config.json that names the classes which load it: ours in FILE where its layers differ, else stock ones."""
    stock = stock_name(config["architectures"][0])
    ours = {name for _, name in _auto_map(config, stock).items()}
    rest = dict(config)
    if isinstance(rest.get("auto_map"), Mapping) and ours & set(map(str, rest["auto_map"].values())):
        del rest["auto_map"]
    if not is_per_layer(config):
        return {**rest, "architectures": [stock]} if config["architectures"] != [stock] else rest
    return {**rest, "architectures": [PREFIX + stock], "auto_map": _auto_map(config, stock)}


def source(stock: str) -> str:
    """The text of FILE for a stock class."""
    base, config = _names(stock)
    return TEMPLATE.format(prefix=PREFIX, stock=stock, base=base, config=config)


def check_file(folder: Path, config: Mapping[str, Any]) -> None:
    """UserError where the code of a per-layer folder is not what this version writes: no other is executed."""
    if not is_per_layer(config):
        return
    named = str((config.get("architectures") or [""])[0])
    stock, file = stock_name(named), folder / FILE
    if named == stock and "auto_map" not in config:
        raise UserError(f"{folder / 'config.json'}: its {KEY} is not of this program; what differs there is not known")
    if not file.is_file():
        raise UserError(f"{file}: missing, but config.json has {KEY}: nothing would load the folder")
    if config.get("auto_map") != _auto_map(config, stock):
        raise UserError(f"{folder / 'config.json'}: auto_map names other classes than those of {FILE}")
    if file.read_bytes() != source(stock).encode():
        raise UserError(
            f"{file}: not the code that autoglm-compress writes for {stock}; no other code is run",
            hint="take the folder as it was written",
        )


def one_or_each(numbers: Sequence[int]) -> int | list[int]:
    """One number where all layers agree, else one a layer: how documents say it."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def span(numbers: Sequence[int]) -> str:
    """The same in a few words: `1256`, or `640 to 1536`."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def load_class(stock: str) -> Any:
    """The class that FILE defines for a stock class, from our own text; transformers is imported."""
    made: dict[str, Any] = {"__name__": f"compress.checkpoint.{PREFIX}{stock}"}
    exec(compile(source(stock), FILE, "exec"), made)  # the text above, and no other
    return made[PREFIX + stock]


def _names(stock: str) -> tuple[str, str]:
    """The base model and the config of a stock class."""
    stem = stock.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return NAMES.get(stock, (f"{stem}Model", f"{stem}Config"))


def _auto_map(config: Mapping[str, Any], stock: str) -> dict[str, str]:
    base, settings = _names(stock)
    auto = "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"
    module = FILE.removesuffix(".py")
    classes = {"AutoConfig": settings, "AutoModel": base, auto: stock}
    return {name: f"{module}.{PREFIX}{made}" for name, made in classes.items()}
