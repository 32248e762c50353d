"""`inspect MODEL`: what a checkpoint is and what can be cut from it, from headers alone."""

from __future__ import annotations

from compress.commands.options import Model, ScreenFlags, flat

EXAMPLE = "autoglm-compress inspect demo:smollm2-135m"


@flat
def inspect(model: Model, show: ScreenFlags) -> None:
    """Show a model's sizes and bytes, what can be cut, and who loads what is left. Reads no weight."""
    screen = show.screen()
    from compress.inspect import inspect_model

    with screen:
        found = inspect_model(model, screen.progress)
    screen.inspection(found)
