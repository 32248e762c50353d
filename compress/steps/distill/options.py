"""Options of the distill step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.losses import LOSSES
from compress.steps.types import StepOptions, one_of


class DistillOptions(StepOptions):
    """Train the student to give the teacher's next-token distribution."""

    loss: Annotated[str, *one_of("loss", LOSSES)] = Field(
        "forward-kl", description=f"The distillation loss: {', '.join(LOSSES)}."
    )
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the training windows.")
    max_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="Stop after this many optimizer steps.")
    batch: Annotated[int, Field(gt=0)] = Field(4, description="Windows per optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="Peak learning rate of AdamW.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Share of the steps that warm up linearly.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(1.0, description="Softmax temperature of both models.")
