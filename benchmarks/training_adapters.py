"""What turns a model of ours into another method's: LoRA by peft, on weights or on factors, and ASI.

    asi          dense weights, compressed inputs                     (`training_asi.py`)
    lora         dense weights, frozen; A and B beside each, and the head, are trained
    lora_left    factors, frozen; A and B beside each `left`, and the head, are trained
    lora_right   the same beside each `right`

SVD-LLM trains one factor after the other, as each depends on what the other has become: `lora_left`, merged,
then `lora_right`.

Source: LoRA, arXiv 2106.09685; the order of the factors, arXiv 2403.07378 section 3.3.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn
from training_asi import compress_inputs
from training_rows import Adapter

from wasi_export.ranks import Plan
from wasi_export.subspace import subspace_layers
from wasi_export.subspace.tucker import Bases
from wasi_export.training.models import head_modules


def adapt(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    *,
    lora_rank: int = 0,
    starts: Mapping[str, Bases] | None = None,
) -> None:
    """Makes a model that of another method, in place; LoRA that is there already is merged first.

    Args:
        model: with the layers of the plan, dense or factored as the adapter says.
        adapter: which method.
        plan: the layers that it acts on are those that have a rank, also where they stay dense.
        lora_rank: r, of the methods that have one.
        starts: where the bases of ASI start, by layer; None: at the first axes.
    """
    if adapter == "asi":
        compress_inputs(model, plan, starts)
        return
    merge_lora(model)
    unpack_factors(model)
    part = {"lora": "", "lora_left": ".left", "lora_right": ".right"}[adapter]
    add_lora(model, [f"{layer.name}{part}" for layer in plan.factored], rank=lora_rank)


def add_lora(model: nn.Module, names: list[str], *, rank: int) -> None:
    """Puts LoRA beside Linear layers and freezes all the rest but the head, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)  # 2r: peft's examples for ViTs
    inject_adapter_in_model(config, model)
    for head in head_modules(model):
        head.requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Adds what LoRA has learnt to the weights it stands beside, and takes it away, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config  # or peft warns that there are several adapters


@torch.no_grad()
def unpack_factors(model: nn.Module) -> None:
    """Replaces factored layers by two Linear layers, `right` and then `left`, in place; the same function."""
    for name, layer in list(subspace_layers(model)):
        right = nn.Linear(layer.in_features, layer.rank, bias=False)
        left = nn.Linear(layer.rank, layer.out_features, bias=layer.bias is not None)
        right.weight, left.weight, left.bias = layer.right, layer.left, layer.bias
        pair = nn.Sequential(OrderedDict(right=right, left=left))
        model.set_submodule(name, pair.train(layer.training))
