"""Options of the quantize step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.formats import ALIASES, FORMATS
from compress.steps.types import StepOptions, one_of


class QuantizeOptions(StepOptions):
    """Write the decoder's linear layers in a smaller number format, tensor by tensor."""

    format: Annotated[str, *one_of("format", [*FORMATS, *ALIASES])] = Field(
        ...,
        description="bf16, fp16 (every float tensor is cast), bnb-int8 (alias int8), w8a16 or w8a8 (the decoder's "
        "linear layers; embeddings, lm_head and vision stay).",
    )
