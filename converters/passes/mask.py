"""A mask that hides what it masks wholly: no subnormal numbers behind the softmax.

Windows that are shifted (Swin) add -100 to the scores of pairs that do not belong together. The softmax makes
that e^-100 = 4e-44, which fp32 can only hold as a subnormal number; an Intel processor multiplies those
a hundred times slower (the product with the values of Swin-T took 34 ms in place of 2.5). So

    m ≤ ln(2^-126) = -87.3   becomes   -1000

and the softmax gives 0. What changes is less than the smallest normal number of fp32, as long as no masked
score exceeds all that are not masked by more than a mask is there to outweigh; each row has one that is not.
"""

import numpy as np
import onnx_ir as ir

_SUBNORMAL = float(np.log(np.finfo(np.float32).tiny))
HIDDEN = -1000.0
"""What is added to a score that is masked."""
_STEPS = ("Add", "Reshape", "Unsqueeze")


class MaskPass(ir.passes.InPlacePass):
    """Lowers the masks that are added to scores of attention, in place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Looks at all that is added before a Softmax, and at the masks of Attention nodes."""
        scores: list[tuple[ir.Node, int]] = []
        for node in model.graph:
            if node.op_type == "Softmax":
                scores.append((node, 0))
            if node.op_type == "Attention" and len(node.inputs) > 3:
                scores.append((node, 3))
        lowered = [_lower(node, index) for node, index in scores]
        return ir.passes.PassResult(model, any(lowered))


def _lower(node: ir.Node, index: int) -> bool:
    """Lowers a mask that is this input of a node, or is added to it before; returns whether there is one."""
    value = node.inputs[index]
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    if found is not None:
        mask = found.numpy()
        weak = (mask <= _SUBNORMAL) & (mask > HIDDEN) if mask.dtype == np.float32 else np.zeros(0, bool)
        # Zeros beside it, in every row: a bias of positions has other numbers, which mean what they say.
        if not weak.any() or mask[~weak].any() or weak.all(axis=-1).any():
            return False
        new = ir.node("Constant", [], {"value": ir.tensor(np.where(weak, np.float32(HIDDEN), mask))})
        assert node.graph is not None
        node.graph.insert_before(node, new)
        new.outputs[0].shape, new.outputs[0].dtype = ir.Shape(mask.shape), ir.DataType.FLOAT
        node.replace_input_with(index, new.outputs[0])
        return True
    before = value.producer() if value is not None else None
    if before is None or before.op_type not in _STEPS or len(before.outputs[0].uses()) != 1:
        return False
    inputs = range(2) if before.op_type == "Add" else range(1)
    return sum(_lower(before, each) for each in inputs) > 0  # of all of them: there may be two masks
