"""Options of the prune step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.criteria import CRITERIA
from compress.steps.types import StepOptions, one_of

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class PruneOptions(StepOptions):
    """Remove query heads and FFN neurons; refit what reads them."""

    ratio: Share | None = Field(
        None,
        description="Share of the decoder layers' attention + FFN matrix parameters to remove; taken from the FFN "
        "alone, or with heads the FFN takes the rest.",
    )
    ffn: Share | None = Field(None, description="Share of the FFN neurons to remove.")
    heads: Share | None = Field(
        None, description="Share of the query heads to remove, equally many from every KV head's group."
    )
    keep_ffn: Count | None = Field(None, description="FFN neurons to keep in every layer, exactly.")
    keep_heads: Count | None = Field(None, description="Query heads to keep in every layer, exactly.")
    criterion: Annotated[str, *one_of("criterion", CRITERIA)] = Field(
        "wanda", description=f"How units are ranked: {', '.join(CRITERIA)}."
    )
    refit: bool = Field(True, description="Refit the reading matrix by least squares from the original weights.")
    damping: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Ridge of the refit (and of obs), relative to the mean of the Gram matrix' diagonal."
    )
