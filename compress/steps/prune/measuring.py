"""Options of the sensitivity command, which ranks as the prune step does. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.criteria import CRITERIA
from compress.steps.types import StepOptions, one_of
from compress.stream import WHOLE

STREAMED = [name for name, criterion in CRITERIA.items() if not criterion.needs & WHOLE]  # others hold a whole model


class SensitivityOptions(StepOptions):
    """How units are ranked, and what is predicted of cuts."""

    criterion: Annotated[str, *one_of("criterion", CRITERIA)] = Field(
        "wanda", description=f"How units are ranked: {', '.join(STREAMED)}."
    )
    damping: Annotated[float, Field(gt=0, le=10**6)] = Field(
        0.01, description="Ridge of the refit (and of obs), relative to the mean of the Gram matrix' diagonal."
    )
    gradient_samples: Annotated[int, Field(gt=0)] = Field(
        16, description="Calibration windows of the backward pass, which weighs outputs by what the loss says of them."
    )
    force: bool = Field(False, description="Measure even with fewer calibration tokens than a Gram matrix has columns.")
    pictures: bool = Field(True, description="Draw pictures (PNG and SVG), which needs the extra `notebook`.")
