"""Which causal language models of the installed transformers pass the proof of compress/trace, and why others do not.

Each is tried with the sizes that its own config class fills in, on the meta device but for the small instance. Prints
the table of docs/families.md: python bench/traced.py [model_type ...]
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any

from compress.arch import FAMILIES, described
from compress.checkpoint.headers import Header
from compress.errors import UserError

LIMIT = 120  # seconds a model


def config_of(kind: str) -> dict[str, Any]:
    """The config.json of a model with nothing but its class' own sizes."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    architecture = named if isinstance(named, str) else named[0]
    return {**CONFIG_MAPPING[kind]().to_dict(), "model_type": kind, "architectures": [architecture]}


def tried(kind: str) -> tuple[str, str]:
    """What can be cut of one model type, or nothing; and why the rest cannot."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        config = config_of(kind)
        family = described(config)
        sizes = family.sizes(Header(config, {}, {}))
        fewer = [n for n in range(sizes.kv_heads, sizes.heads, sizes.kv_heads)]
        reason = "it has one query head a KV head"
        for heads in fewer[len(fewer) // 2 :][:1]:
            reason = family.refuse(type(sizes)(**{**vars(sizes), "heads": heads}), config) or ""
        return ("FFN and heads" if fewer and not reason else "FFN"), reason
    except UserError as error:
        return "", error.message.partition("not supported: ")[2] or error.message
    except TimeoutError:
        return "", f"not finished in {LIMIT} seconds"
    except Exception as error:  # a default config that its own class does not take
        return "", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    finally:
        signal.alarm(0)


def main() -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    described_types = {family.model_type for family in FAMILIES.values()}
    kinds = sys.argv[1:] or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - described_types)
    print("| model_type | can be cut | why not more |\n|---|---|---|", flush=True)
    for kind in kinds:
        started = time.perf_counter()
        cut, why = tried(kind)
        print(f"| `{kind}` | {cut or 'refused'} | {why.replace('|', '/')} |", flush=True)
        print(f"{kind}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
