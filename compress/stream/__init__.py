"""The streaming executor: stock decoder layers, one at a time in memory, fed with all windows."""

from typing import Literal

# What can be gathered of the inputs X [windows, L, n] that one Linear reads (statistics.py says what each is), and of
# the gradients around it (backward.py). Named here, where no torch is imported: the table of criteria says which of
# them each needs.
Statistic = Literal[
    "gram", "square", "variance", "activity", "taylor", "fisher", "output_fisher", "tp_magnitude", "tp_taylor"
]
GRADIENTS: frozenset[Statistic] = frozenset({"taylor", "fisher", "output_fisher"})  # these take a backward pass
WHOLE: frozenset[Statistic] = frozenset({"tp_magnitude", "tp_taylor"})  # these, the whole model in memory
