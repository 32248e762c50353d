"""What the public functions take and give, as type checkers and editors see it. Torch-free.

What stands between the marks at the end is written from the steps' options by `python -m tests.recipe_docs`: a step's
keys are declared in its options model alone.
"""

from __future__ import annotations

from typing import Any, NotRequired, Required, TypedDict

from compress.machine import Machine, Progress


class InspectedGroup(TypedDict):
    """Units that can be cut. `units_per_layer`: a list where layers differ; `step`: units go in multiples of it;
    `multiple`: what stays is one of it where a share or a target decides; `refitted`: the module whose inputs the
    units are."""

    group: str
    units_per_layer: int | list[int]
    step: int
    multiple: int
    parameters_per_unit: int
    refitted: str


class InspectedCut(TypedDict):
    """What an `option` of prune can leave, and who loads that. `keep`: the counts that may stay, None for any;
    `besides`: options that go with it, where several ways lead to different labels or counts; `loaded_by`: stock
    transformers, and vLLM where that was proved."""

    option: str
    keep: list[int] | None
    besides: dict[str, str]
    model_type: str
    architecture: str
    loaded_by: list[str]


class Inspection(TypedDict):
    """What `inspect` finds. `bytes`: of the tensors as stored; `decoder_parameters`: those of the decoder layers.

    `trust_remote_code`: its layers differ in width; `traced`: its family was traced, not described; `loaded_by`: who
    loads the model as it is; `cuts`: empty for a quantized model, which cannot be pruned."""

    model: str
    model_type: str
    architecture: str | None
    trust_remote_code: bool
    traced: bool
    format: str
    dtype: str
    parameters: int
    decoder_parameters: int
    bytes: int
    tensors: int
    files: int
    sizes: dict[str, int]
    loaded_by: list[str]
    groups: list[InspectedGroup]
    cuts: list[InspectedCut]


class _Alone(TypedDict):
    perplexity: float
    tokens: int
    parameters: int
    bytes: int


class Evaluation(_Alone, total=False):
    """What `evaluate` measures over `tokens` predicted positions; with a reference the distance from it.

    `perplexity_ratio`: perplexity over the reference's. `kl`: mean KL(reference || model), nats a token.
    `top1_agreement`: share of positions where both models' likeliest next token is the same.
    """

    reference_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float


class ReceiptSource(TypedDict):
    """A model that was read. `revision`: the hub's commit or the digest of a converted file; `sha256`: of its files."""

    name: str
    revision: str | None
    sha256: dict[str, str]


class Receipt(TypedDict):
    """Why a result can be trusted. `receipt`: version of this format; `libraries`: their versions; `recipe` with every
    default; a dict for each of `steps` and of the measured `stages`; `gates`: which failed; `files`: digests."""

    receipt: int
    autoglm_compress: str
    libraries: dict[str, str]
    threads: int
    device: str
    shard_bytes: int
    recipe: dict[str, Any]
    model: ReceiptSource
    teacher: NotRequired[ReceiptSource]
    parameters: int
    evaluation_sha256: str | None
    evaluation_revisions: NotRequired[dict[str, str]]
    steps: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    gates: dict[str, list[str]] | None
    files: dict[str, str]


class SensitivityKeywords(TypedDict, total=False):
    """Of `measure_sensitivity`, as the command's options."""

    criterion: str
    damping: float
    gradient_samples: int
    force: bool
    pictures: bool


class RunKeywords(TypedDict, total=False):
    """Of `run`, and of every function that carries out one step."""

    machine: Machine | None
    """Threads, memory and device; all there are by default."""
    overwrite: bool
    """Replace an earlier result."""
    keep_work: bool
    """Keep the steps' folders in OUT.work."""
    fresh: bool
    """Start over; take nothing from OUT.work."""
    discard: bool
    """Keep nothing in OUT.work when the run fails."""
    wait: bool
    """Wait for another run that writes the same folder, in the place of a UserError."""
    stop_after: int | None
    """End after so many steps and keep OUT.work; the next run goes on from there."""
    checkpoint_every: float
    """Seconds between the saved states of a step."""
    shard_bytes: int
    """The largest safetensors file that is written."""
    progress: Progress | None
    """What is told while it works; nothing by default."""


DEFAULTS: dict[str, Any] = {
    "machine": None,
    "overwrite": False,
    "keep_work": False,
    "fresh": False,
    "discard": False,
    "wait": False,
    "stop_after": None,
    "checkpoint_every": 60.0,
    "shard_bytes": 5 * 10**9,
    "progress": None,
    "seed": 0,
}


class StepKeywords(RunKeywords, total=False):
    """Of a function that carries out one step."""

    seed: int
    """Seed of all that is drawn."""


# keys of the steps


class PruneKeywords(StepKeywords, total=False):
    """Of `prune`."""

    ratio: float | None
    """Share of the decoder layers' attention + FFN matrix parameters to remove; taken from the FFN alone, or with heads
    the FFN takes the rest; with from_sensitivity as its curves say.
    """
    ffn: float | None
    """Share of the FFN neurons to remove."""
    heads: float | None
    """Share of the query heads to remove, equally many from every KV head's group."""
    keep_ffn: int | None
    """FFN neurons to keep in every layer, exactly."""
    keep_heads: int | None
    """Query heads to keep in every layer, exactly."""
    keep_layers: int | None
    """Decoder layers to keep, exactly; ratio and the targets count what goes with the others."""
    keep_vision_layers: int | None
    """Blocks of the vision tower to keep, exactly; found on the calibration's images."""
    keep_vision_ffn: int | None
    """FFN neurons of the vision tower's merger to keep, exactly; ranked and refitted on images."""
    keep_kv_heads: int | None
    """KV heads to keep in every layer, exactly: merged (a divisor of what the model has) or dropped."""
    kv_cache_bytes: float | str | None
    """Bytes that the keys and values of a token may take in the cache, in the checkpoint's dtype, as in 12KiB: as many
    KV heads stay as fit.
    """
    kv_merge: str
    """What becomes of KV heads: mean (averaged), aligned (turned towards each other, then the best common head) or drop
    (the least costly go, with their query heads).
    """
    layer_criterion: str
    """Which layers go: angular (the block whose input and output differ least in angle), influence (those that change
    the angle of their input least) or loss (those without which, one at a time, the model's loss rises least).
    """
    layer_samples: int
    """Calibration windows, at most, on which layer_criterion loss measures the model without each layer: as much work
    as layers / 2 forward passes over them.
    """
    params: float | str | None
    """Parameters of the whole model to stay within, by 1.5 % at most, as in 9B or 900M: the FFN takes what heads or
    keep_heads leave.
    """
    bytes: float | str | None
    """Bytes of this step's weight files to stay within, as in 17.9GB or 11GiB; like params."""
    allocation: str
    """Widths alike in all layers (uniform), or by layer (per-layer: needs from_sensitivity, and who loads the result
    trust_remote_code).
    """
    protect: list[str] | str | None
    """Decoder modules that are not cut, by name or pattern, as in layers.11.mlp,layers.0-3.*; layers then differ in
    width.
    """
    pin: dict[str, int] | str | None
    """Units that stay in decoder modules, exactly, as in layers.5.mlp=1024,layers.2?.self_attn=8; layers then differ in
    width.
    """
    flavour: str
    """What a glm4v with fewer heads becomes: portable (glm46v, for stock transformers and vLLM) or native (glm4v, for
    vLLM alone).
    """
    criterion: str
    """How units are ranked: wanda, obs, flap, activation, taylor, fisher, tp-magnitude, tp-taylor, magnitude, random.
    """
    from_sensitivity: str | None
    """Folder of the sensitivity command, of this very model: units are ranked as there, and only what the refit needs
    is gathered again.
    """
    gradient_samples: int
    """Calibration windows, at most, that the backward pass of taylor, fisher and tp-taylor sees."""
    refit: bool
    """Refit the reading matrix by least squares from the original weights."""
    joint_refit: int
    """Gauss-Newton steps, after the refit, that move the FFN's gate, up and down projections together towards what the
    whole FFN gave; 2 are worth their time, if quality is.
    """
    error_propagation: float
    """How far the FFN's refits are aimed from what the whole layer gives for what it gets from pruned layers (0) at
    what it gave in the dense model (1), to make good what those have lost; 0.3 is worth its time, if quality is.
    """
    damping: float
    """Ridge of the refit (and of obs), relative to the mean of the Gram matrix' diagonal."""
    held_out: float | None
    """Share of the calibration windows that are kept back: on them the damping of each refit is chosen, of values
    between 0.001 and 0.3; the refit itself then sees all windows.
    """
    token_weights: str
    """What calibration tokens weigh in all statistics: none (all the same) or norm (1 / mean square of the residual
    stream that goes into the layer).
    """
    token_shares: dict[str, int] | str | None
    """Share of the weight of all tokens that each kind of token has (text, image, prompt, answer), as in
    prompt=0.4,answer=0.6; every kind that occurs must be named.
    """
    force: bool
    """Prune even with fewer calibration tokens than a refitted matrix has columns."""


class DistillKeywords(StepKeywords, total=False):
    """Of `distill`."""

    loss: str
    """The distillation loss: forward-kl."""
    epochs: float
    """Passes over the training windows."""
    max_steps: int | None
    """Stop after this many optimizer steps."""
    batch: int
    """Windows per optimizer step."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup: float
    """Share of the steps that warm up linearly."""
    weight_decay: float
    """AdamW's decoupled weight decay."""
    max_grad_norm: float
    """Gradients are clipped to this norm."""
    temperature: float
    """Softmax temperature of both models."""


class QuantizeKeywords(StepKeywords, total=False):
    """Of `quantize`."""

    format: Required[str]
    """bf16, fp16 (every float tensor is cast), bnb-int8 (alias int8), w8a16 or w8a8 (the decoder's linear layers;
    embeddings, lm_head and vision stay).
    """


STEP_KEYWORDS: dict[str, Any] = {"prune": PruneKeywords, "distill": DistillKeywords, "quantize": QuantizeKeywords}
# end
