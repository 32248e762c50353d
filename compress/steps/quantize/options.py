"""Options of the quantize step."""

from __future__ import annotations

from pydantic import Field

from compress.steps.types import StepOptions


class QuantizeOptions(StepOptions):
    """Write the decoder's linear layers in a smaller number format, tensor by tensor."""

    format: str = Field(
        ..., description="bf16, fp16, bnb-int8 (alias int8) or w8a16. Embeddings, lm_head and vision stay as they are."
    )
