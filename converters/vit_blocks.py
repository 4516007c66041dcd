"""The parts of timm's vision transformers, each written as timm's `forward` of it computes in eval mode.

A part is found by its exact class: a subclass may compute something else.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from timm.layers import (
    GELU,
    Attention,
    AttentionPoolLatent,
    DiffAttention,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    SwiGLU,
)
from timm.layers.attention_pool import AttentionPoolPrr
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn

from wasi_export.converters.graph_builder import GraphBuilder, UncoveredModuleError

Rows = ir.Value
"""Tokens of a batch [B·N, D]."""


def write(g: GraphBuilder, module: Any, x: Rows, tokens: int) -> Rows:
    """Returns what a module makes of the tokens of a batch.

    Args:
        g: the graph.
        module: one of `MODULES`.
        x: [B·N, D].
        tokens: N.

    Raises:
        UncoveredModuleError: it, or a part of it, is something else.
    """
    writer = MODULES.get(type(module))
    if writer is None:
        raise UncoveredModuleError(g.name_of(module), module)
    return writer(g, module, x, tokens)


def _block(g: GraphBuilder, block: Any, x: Rows, tokens: int) -> Rows:
    y = write(g, block.attn, write(g, block.norm1, x, tokens), tokens)
    x = g.op("Add", x, write(g, block.ls1, y, tokens))
    y = write(g, block.mlp, write(g, block.norm2, x, tokens), tokens)
    return g.op("Add", x, write(g, block.ls2, y, tokens))


def _res_post_block(g: GraphBuilder, block: Any, x: Rows, tokens: int) -> Rows:
    x = g.op("Add", x, write(g, block.norm1, write(g, block.attn, x, tokens), tokens))
    return g.op("Add", x, write(g, block.norm2, write(g, block.mlp, x, tokens), tokens))


def _parallel_things_block(g: GraphBuilder, block: Any, x: Rows, tokens: int) -> Rows:
    for branches in (block.attns, block.ffns):
        outputs = []
        for branch in branches:
            y = x
            for module in branch:
                y = write(g, module, y, tokens)
            outputs.append(y)
        for y in outputs:
            x = g.op("Add", x, y)
    return x


def _parallel_scaling_block(g: GraphBuilder, block: Any, x: Rows, tokens: int) -> Rows:
    y = g.linear(block.in_proj, write(g, block.in_norm, x, tokens))
    hidden, q, k, v = g.split(y, block.in_split)
    bias = g.parameter(block, "mlp_bias")
    hidden = hidden if bias is None else g.op("Add", hidden, bias)
    if type(block) is DiffParallelScalingBlock:
        attended = _differential(g, block, (q, k, v), tokens)
    else:
        attended = _attend(g, block, (q, k, v), tokens)
    hidden = write(g, block.mlp_act, hidden, tokens)
    if block.out_proj is not None:
        y = g.linear(block.out_proj, g.op("Concat", attended, hidden, axis=-1))
    else:
        y = g.op("Add", g.linear(block.attn_out_proj, attended), g.linear(block.mlp_out_proj, hidden))
    return g.op("Add", x, write(g, block.ls, y, tokens))


def _attention(g: GraphBuilder, attn: Any, x: Rows, tokens: int) -> Rows:
    qkv = g.reshape(g.linear(attn.qkv, x), -1, tokens, 3 * attn.attn_dim)
    y = _attend(g, attn, g.split(qkv, [attn.attn_dim] * 3), tokens)
    y = write(g, attn.norm, y, tokens)
    if attn.gate is not None:
        y = g.op("Mul", y, g.op("Sigmoid", g.linear(attn.gate, x)))
    return g.linear(attn.proj, y)


def _attend(g: GraphBuilder, attn: Any, qkv: Any, tokens: int) -> Rows:
    """Returns the heads' outputs side by side. q, k, v: rows, or [B, N, H·D]."""
    heads, width = attn.num_heads, attn.head_dim
    q, k, v = (g.reshape(part, -1, tokens, heads * width) for part in qkv)
    q, k = (_norm_heads(g, norm, x, width) for norm, x in ((attn.q_norm, q), (attn.k_norm, k)))
    y = g.attention(q, k, v, heads=heads, head_dim=width)
    return g.reshape(y, -1, heads * width)


def _diff_attention(g: GraphBuilder, attn: Any, x: Rows, tokens: int) -> Rows:
    width = 2 * attn.num_heads * attn.head_dim
    y = _differential(g, attn, g.split(g.linear(attn.qkv, x), [width] * 3), tokens)
    return g.linear(attn.proj, write(g, attn.norm, y, tokens))


def _differential(g: GraphBuilder, attn: Any, qkv: Any, tokens: int) -> Rows:
    """Returns the difference of two attentions on the same v, whose heads are twice as wide."""
    heads, width = attn.num_heads, attn.head_dim
    q, k, v = (g.reshape(part, -1, tokens, 2 * heads * width) for part in qkv)
    pairs = []
    for norm, x in ((attn.q_norm, q), (attn.k_norm, k)):
        x = g.reshape(_norm_heads(g, norm, x, width), -1, tokens, heads, 2, width)
        pairs.append([g.reshape(half, -1, tokens, heads * width) for half in g.split(x, [1, 1], axis=3)])
    first, second = (g.attention(q, k, v, heads=heads, head_dim=width) for q, k in zip(*pairs, strict=True))
    with torch.no_grad():
        share = attn._compute_lambda().item()
    y = g.op("Sub", first, g.op("Mul", second, g.constant(share)))
    y = _norm_heads(g, attn.sub_norm, y, 2 * width)
    return g.reshape(g.op("Mul", y, g.constant(1 - attn.lambda_init)), -1, 2 * heads * width)


def _norm_heads(g: GraphBuilder, norm: nn.Module, x: ir.Value, width: int) -> ir.Value:
    """Returns [B, N, H·D] with each head normalised."""
    if type(norm) is nn.Identity:
        return x
    heads = g.op("Reshape", x, g.constant(np.array([0, 0, -1, width])))
    return g.op("Reshape", write(g, norm, heads, 0), g.constant(np.array([0, 0, -1])))


def _mlp(g: GraphBuilder, mlp: Any, x: Rows, tokens: int) -> Rows:
    y = write(g, mlp.act, g.linear(mlp.fc1, x), tokens)
    return g.linear(mlp.fc2, write(g, mlp.norm, y, tokens))


def _glu_mlp(g: GraphBuilder, mlp: Any, x: Rows, tokens: int) -> Rows:
    if mlp.chunk_dim != -1:
        raise UncoveredModuleError(g.name_of(mlp), mlp)
    width = mlp.fc2.in_features
    first, second = g.split(g.linear(mlp.fc1, x), [width, width])
    gate, y = (second, first) if mlp.gate_last else (first, second)
    y = g.op("Mul", y, write(g, mlp.act, gate, tokens))
    return g.linear(mlp.fc2, write(g, mlp.norm, y, tokens))


def _swiglu(g: GraphBuilder, mlp: Any, x: Rows, tokens: int) -> Rows:
    gate = write(g, mlp.act, g.linear(mlp.fc1_g, x), tokens)
    y = g.op("Mul", gate, g.linear(mlp.fc1_x, x))
    return g.linear(mlp.fc2, write(g, mlp.norm, y, tokens))


def _attention_pool(g: GraphBuilder, pool: Any, x: Rows, tokens: int) -> Rows:
    """Returns [B, D]: what learnt queries find, pooled over the queries."""
    heads, width, queries = pool.num_heads, pool.head_dim, pool.latent_len
    x = g.reshape(x, -1, tokens, heads * width)
    if pool.pos_embed is not None:
        x = g.op("Add", x, g.parameter(pool, "pos_embed"))
    latent = g.op("Reshape", g.parameter(pool, "latent"), g.constant(np.array([queries, pool.latent_dim])))
    q = g.reshape(g.linear(pool.q, latent), 1, queries, heads * width)
    k, v = g.split(g.linear(pool.kv, g.reshape(x, -1, heads * width)), [heads * width] * 2)
    k, v = (g.reshape(part, -1, tokens, heads * width) for part in (k, v))
    q, k = (_norm_heads(g, norm, part, width) for norm, part in ((pool.q_norm, q), (pool.k_norm, k)))
    y = g.attention(q, k, v, heads=heads, head_dim=width, one_query=True)
    y = g.linear(pool.proj, g.reshape(y, -1, heads * width))
    if pool.mlp is not None:
        y = g.op("Add", y, write(g, pool.mlp, write(g, pool.norm, y, queries), queries))
    return pooled(g, y, (queries, heads * width), pool.pool)


def _attention_pool_prr(g: GraphBuilder, pool: Any, x: Rows, tokens: int) -> Rows:
    """Returns [B, D]: tokens that attended to each other as they are, pooled."""
    heads, width = pool.num_heads, pool.head_dim
    x = g.reshape(write(g, pool.pre_norm, x, tokens), -1, tokens, heads * width)
    y = g.attention(x, x, x, heads=heads, head_dim=width)
    y = write(g, pool.post_norm, g.reshape(y, -1, heads * width), tokens)
    return pooled(g, y, (tokens, heads * width), pool.pool)


def pooled(g: GraphBuilder, x: Rows, sizes: tuple[int, int], pool: str, *, skipped: int = 0) -> Rows:
    """Returns one row an image [B, D], or all rows where the pool is none.

    Args:
        g: the graph.
        x: tokens [B·N, D].
        sizes: (N, D).
        pool: how, in timm's words.
        skipped: first tokens that are not pooled, unless the first token is all that is.
    """
    tokens, width = sizes
    if not pool:
        return x
    y = g.reshape(x, -1, tokens, width)
    if pool == "token":
        return g.reshape(g.op("Gather", y, g.constant(np.array([0])), axis=1), -1, width)
    y = _without_first(g, y, tokens, skipped)
    found = {
        "avg": lambda: g.reduce("Mean", y, axis=1),
        "max": lambda: g.reduce("Max", y, axis=1),
        "avgmax": lambda: g.op(
            "Mul",
            g.op("Add", g.reduce("Max", y, axis=1), g.reduce("Mean", y, axis=1)),
            g.constant(0.5),
        ),
    }
    return found[pool]()


def without_first(g: GraphBuilder, x: Rows, sizes: tuple[int, int], skipped: int) -> Rows:
    """Returns the rows of all but some first tokens. x: [B·N, D] of sizes (N, D)."""
    if not skipped:
        return x
    tokens, width = sizes
    return g.reshape(_without_first(g, g.reshape(x, -1, tokens, width), tokens, skipped), -1, width)


def _without_first(g: GraphBuilder, x: ir.Value, tokens: int, skipped: int) -> ir.Value:
    """Returns [B, N, D] without its first tokens."""
    if not skipped:
        return x
    return g.op("Slice", x, *(g.constant(np.array([bound])) for bound in (skipped, tokens, 1)))


def _layer_norm(g: GraphBuilder, norm: Any, x: ir.Value, tokens: int) -> ir.Value:
    weight, bias = g.parameter(norm, "weight"), g.parameter(norm, "bias")
    if weight is None or len(norm.normalized_shape) != 1:
        raise UncoveredModuleError(g.name_of(norm), norm)
    return g.op("LayerNormalization", x, weight, bias, epsilon=norm.eps, axis=-1)


def _rms_norm(g: GraphBuilder, norm: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.rms_norm(x, g.parameter(norm, "weight"), norm.eps)


def _layer_scale(g: GraphBuilder, scale: Any, x: Rows, tokens: int) -> Rows:
    return g.op("Mul", x, g.parameter(scale, "gamma"))


def _gelu(g: GraphBuilder, act: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.gelu(x, tanh=getattr(act, "approximate", "none") == "tanh")


def _gelu_tanh(g: GraphBuilder, act: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.gelu(x, tanh=True)


def _silu(g: GraphBuilder, act: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.op("Mul", x, g.op("Sigmoid", x))


def _quick_gelu(g: GraphBuilder, act: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.constant(1.702))))


def _relu(g: GraphBuilder, act: Any, x: ir.Value, tokens: int) -> ir.Value:
    return g.op("Relu", x)


def _identity(g: GraphBuilder, module: Any, x: ir.Value, tokens: int) -> ir.Value:
    return x


MODULES: Mapping[type, Callable[[GraphBuilder, Any, ir.Value, int], ir.Value]] = {
    Block: _block,
    ResPostBlock: _res_post_block,
    ParallelThingsBlock: _parallel_things_block,
    ParallelScalingBlock: _parallel_scaling_block,
    DiffParallelScalingBlock: _parallel_scaling_block,
    Attention: _attention,
    DiffAttention: _diff_attention,
    Mlp: _mlp,
    GluMlp: _glu_mlp,
    SwiGLU: _swiglu,
    AttentionPoolLatent: _attention_pool,
    AttentionPoolPrr: _attention_pool_prr,
    LayerScale: _layer_scale,
    LayerNorm: _layer_norm,
    nn.LayerNorm: _layer_norm,
    RmsNorm: _rms_norm,
    nn.GELU: _gelu,
    GELU: _gelu,
    GELUTanh: _gelu_tanh,
    QuickGELU: _quick_gelu,
    nn.SiLU: _silu,
    nn.ReLU: _relu,
    nn.Identity: _identity,
    nn.Dropout: _identity,
    DropPath: _identity,
}
"""What writes each part of a vision transformer."""
