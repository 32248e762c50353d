"""Layers and groups that most families are made of: a few words describe a decoder. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from compress.arch.family import Cut, Group, Sizes

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*QKV, "self_attn.o_proj")
QKV_FUSED = "self_attn.qkv_proj"
NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH = (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")  # norms around attention and FFN


def decoder_layer(
    sizes: Sizes,
    *,
    biases: Iterable[str] = (),
    norms: Iterable[str] = NORMS,
    head_norms: Iterable[str] = (),
    fused_qkv: bool = False,
    fused_ffn: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors.

    biases: the Linears that have one. norms: those over the hidden size; head_norms: those over one head.
    fused_qkv: q, k and v are one matrix, in that order; fused_ffn: so are gate and up.
    """
    h, q, kv, f = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.ffn
    linears = {"mlp.down_proj": (h, f), "self_attn.o_proj": (h, q)}
    linears |= {QKV_FUSED: (q + 2 * kv, h)} if fused_qkv else dict(zip(QKV, ((q, h), (kv, h), (kv, h)), strict=True))
    linears |= {"mlp.gate_up_proj": (2 * f, h)} if fused_ffn else {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h)}
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    weights |= {f"{name}.weight": (h,) for name in norms}
    weights |= {f"{name}.weight": (sizes.head_dim,) for name in head_norms}
    return dict(sorted(weights.items())) | {f"{name}.bias": linears[name][:1] for name in biases}


def norm_behind_ffn(shapes: Collection[str]) -> str | None:
    """The norm through which a layer with tensors of these names adds what its FFN gives to the residual stream."""
    names = ("post_mlp_layernorm", "post_feedforward_layernorm")
    return next((name for name in names if f"{name}.weight" in shapes), None)


def ffn_fused(sizes: Sizes) -> Group:
    """FFN neurons where gate and up are one matrix [2*ffn, hidden]: gate rows first, then up rows."""
    cuts = (
        Cut("mlp.gate_up_proj.weight", 0),
        Cut("mlp.gate_up_proj.weight", 0, offset=sizes.ffn),
        Cut("mlp.down_proj.weight", 1),
    )
    return Group("ffn", sizes.ffn, "mlp.down_proj", 1, cuts, "intermediate_size", sizes.ffn)


def ffn_split(sizes: Sizes, bias: bool) -> Group:
    """FFN neurons where gate and up are two matrices [ffn, hidden]."""
    cuts = [Cut("mlp.gate_proj.weight", 0), Cut("mlp.up_proj.weight", 0), Cut("mlp.down_proj.weight", 1)]
    if bias:
        cuts += [Cut("mlp.gate_proj.bias", 0), Cut("mlp.up_proj.bias", 0)]
    return Group("ffn", sizes.ffn, "mlp.down_proj", 1, tuple(cuts), "intermediate_size", sizes.ffn)


def query_heads(sizes: Sizes, bias: bool, rows: str = QKV[0]) -> Group:
    """Query heads: rows of q_proj (and its bias), columns of o_proj; equally many from every KV head's group.

    `rows`: the Linear whose first rows make the queries.
    """
    d = sizes.head_dim
    cuts = [Cut(f"{rows}.weight", 0, width=d), Cut("self_attn.o_proj.weight", 1, width=d)]
    if bias:
        cuts.append(Cut(f"{rows}.bias", 0, width=d))
    return Group("heads", sizes.heads, "self_attn.o_proj", d, tuple(cuts), "num_attention_heads", sizes.group_size)
