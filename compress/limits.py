"""How much is alive at once: the sizes that the work keeps to and that plans count with, so that both agree."""

from __future__ import annotations

BATCH_TOKENS = 2048  # tokens of one forward batch: bounds the activations of a wide FFN
VOCAB_BYTES = 4 * 2**20  # float32 bytes of the output matrix in memory at once: few enough for a core's cache
HEAD_TOKENS = 512  # positions whose float32 logits are alive at once: 300 MB where the vocabulary has 150,000
DEPTH_POSITIONS = 1024  # positions of the calibration at which the inputs of decoder layers are compared, at most
PACKERS = 8  # blocks of rows that are packed beside each other, at most
BEHIND = 4 * 2**20  # bytes that wait to be written while the next are made
DOUBLE_UP_TO = 4096  # columns; above, float64 costs twice the memory of an H that is the largest thing alive
TAPE_BYTES = 512 * 2**20  # inputs of all layers, for a backward pass: in memory up to here, above in a file
JOINT_ITERATIONS = 6  # of conjugate gradients in one step of a joint refit
JOINT_BYTES = 2**30  # what a joint refit keeps of the FFN's inside; above, each iteration makes it anew, a fifth slower
ENOUGH = 4  # calibration tokens for a column of a Gram matrix; under it refits and predictions are poor
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # what held-out windows choose from, times the mean of the diagonal


def vocab_rows(hidden: int) -> int:
    """Rows of the output matrix that are in memory at once."""
    return max(1, VOCAB_BYTES // (4 * hidden))
