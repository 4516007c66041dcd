"""timm's vision transformers, written directly as the graph that runs fastest; no tracer.

    images → patch embedding → [B, P, D] → + embeddings → blocks on rows [B·N, D] → pool → head

Class, register and position embeddings only ever add to the tokens of the patches, so they become one
constant [1, N, D]: what timm's own `_pos_embed` makes of patches that are zero.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wasi_export.converters.graph_builder import GraphBuilder, UncoveredModuleError
from wasi_export.converters.vit_blocks import pooled, without_first, write
from wasi_export.manifest import InputSpec

EMBEDDINGS = "embeddings"
"""Initializer [1, N, D]: position embeddings, with the class and register tokens in the rows of those."""
_TOKENS = ("cls_token", "reg_token", "dist_token")  # in the order of timm's rows; no model has the last two


def write_vit(model: nn.Module, spec: InputSpec, *, opset: int, output: str) -> ir.Model:
    """Returns the graph of a vision transformer: `images` [batch, C, H, W] → logits [batch, classes].

    Without a head the output is the pooled features [batch, D], without a pool all tokens [batch, N, ·].

    Args:
        model: a `VisionTransformer` of timm, in fp32; its Linear layers may be factored.
        spec: name and size of the input.
        opset: version of the ONNX operators, 17 to 25.
        output: name of the output.

    Raises:
        UncoveredModuleError: it, or a part of it, is another module.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UncoveredModuleError("", model)
    g = GraphBuilder(model, opset)
    images = ir.val(spec.name, ir.DataType.FLOAT, ["batch", spec.channels, spec.height, spec.width])
    y = _write_model(g, model.eval(), images, spec)
    with torch.no_grad():
        shape = model(torch.zeros(1, spec.channels, spec.height, spec.width)).shape
    if len(shape) == 3:
        y = g.reshape(y, -1, *shape[1:])
    y.name, y.type, y.shape = output, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", *shape[1:]])
    g.graph.inputs.append(images)
    g.graph.outputs.append(y)
    return ir.Model(g.graph, ir_version=10)


def _write_model(g: GraphBuilder, model: Any, images: ir.Value, spec: InputSpec) -> ir.Value:
    x, tokens = _write_embeddings(g, model, images, spec)
    x = write(g, model.norm_pre, x, tokens)
    for block in model.blocks:
        x = write(g, block, x, tokens)
    x = write(g, model.norm, x, tokens)
    if type(model) is VisionTransformerDistilled:
        return _write_distilled_head(g, model, x, tokens)
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.attn_pool is None:
        x = pooled(g, x, (tokens, model.embed_dim), model.global_pool, skipped=skipped)
    else:
        x = without_first(g, x, (tokens, model.embed_dim), skipped)
        x = write(g, model.attn_pool, x, tokens - skipped)
    return g.linear(model.head, write(g, model.fc_norm, x, tokens))


def _write_embeddings(g: GraphBuilder, model: Any, images: ir.Value, spec: InputSpec) -> tuple[ir.Value, int]:
    """Returns the tokens [B·N, D] that the first block sees, before `norm_pre`, and N."""
    with torch.no_grad():
        patches = model.patch_embed(torch.zeros(1, spec.channels, spec.height, spec.width))
        added = model._pos_embed(torch.zeros_like(patches))
    tokens, width = added.shape[1:]
    count = patches.numel() // width
    if type(model.patch_embed) is PatchEmbed:
        x = _write_patch_embed(g, model.patch_embed, images, spec, (count, width))
    else:
        x = g.include(model.patch_embed, images, spec)
        x = g.reshape(x, -1, count, width)
    if tokens > count:
        x = g.op("Pad", x, g.constant(np.array([0, tokens - count, 0, 0, 0, 0])))
    x = g.op("Add", x, _write_added(g, model, added))
    return g.reshape(x, -1, width), tokens


def _write_added(g: GraphBuilder, model: Any, added: Tensor) -> ir.Value | None:
    """Returns what is added to the tokens of the patches [1, N, D], made of the parameters it is a sum of.

    Positions that were resized for the image are no such sum, and a constant.
    """
    keys = [key for key in _TOKENS if getattr(model, key, None) is not None]
    positions, prefix = model.pos_embed, [getattr(model, key) for key in keys]
    rest = added.shape[1] - sum(token.shape[1] for token in prefix)
    if positions is not None and not keys and torch.equal(positions, added):
        return g.parameter(model, "pos_embed")
    if positions is None or not torch.equal(added[:, -rest:], positions[:, -rest:]):
        return g.constant(added.numpy(), EMBEDDINGS)
    first = g.op("Concat", *(g.parameter(model, key) for key in keys), axis=1)
    if positions.shape[1] == rest:
        found = g.op("Concat", first, g.parameter(model, "pos_embed"), axis=1)
    else:
        padded = g.op("Pad", first, g.constant(np.array([0, 0, 0, 0, rest, 0])))
        found = g.op("Add", g.parameter(model, "pos_embed"), padded)
    found.name = EMBEDDINGS
    return found


def _write_patch_embed(
    g: GraphBuilder, embed: Any, images: ir.Value, spec: InputSpec, sizes: tuple[int, int]
) -> ir.Value:
    """Returns the tokens of the patches [B, P, D]."""
    proj = embed.proj
    parameters = (g.parameter(proj, "weight"), g.parameter(proj, "bias"))
    x = g.op(
        "Conv",
        _padded(g, embed, images, spec),
        *(parameter for parameter in parameters if parameter is not None),
        kernel_shape=proj.kernel_size,
        strides=proj.stride,
    )
    x = g.transpose(g.reshape(x, -1, *sizes[::-1]), 0, 2, 1)
    return write(g, embed.norm, x, sizes[0])


def _padded(g: GraphBuilder, embed: Any, images: ir.Value, spec: InputSpec) -> ir.Value:
    if not embed.dynamic_img_pad:
        return images
    missing = [-size % patch for size, patch in zip((spec.height, spec.width), embed.patch_size, strict=True)]
    return g.op("Pad", images, g.constant(np.array([0, 0, 0, 0, 0, 0, *missing]))) if any(missing) else images


def _write_distilled_head(g: GraphBuilder, model: Any, x: ir.Value, tokens: int) -> ir.Value:
    """Returns the mean of what the heads make of the class and the distillation token."""
    x = g.reshape(x, -1, tokens, model.embed_dim)
    both = g.op("Gather", x, g.constant(np.array([0, 1])), axis=1)
    heads = [
        g.linear(head, g.reshape(row, -1, model.embed_dim))
        for head, row in zip((model.head, model.head_dist), g.split(both, [1, 1], axis=1), strict=True)
    ]
    return g.op("Mul", g.op("Add", *heads), g.constant(0.5))
