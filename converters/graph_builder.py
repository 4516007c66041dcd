"""Writes a graph operator by operator, in the form that needs no optimiser to run fast.

Tokens are rows: between operators a batch is [B·N, D], so that each Linear is one Gemm with the weight as
torch has it. Parameters keep their names. What is newer than the opset asked for is written out.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from torch import Tensor, nn

from wasi_export.converters.tracing import MIN_TRACED_OPSET, trace
from wasi_export.errors import UnsupportedModelError
from wasi_export.manifest import InputSpec
from wasi_export.subspace.linear import SubspaceLinear

GELU_OPSET, RMS_NORM_OPSET, ATTENTION_OPSET = 20, 23, 23
REDUCE_OPSET = 18  # of the axes as an input


class UncoveredModuleError(UnsupportedModelError):
    """A module that is not written directly; torch.export may take the model."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Makes the error for a module of a model."""
        super().__init__(f"{name or 'the model'} is a {type(module).__name__}, which is not written directly")


Attribute = int | float | str | Sequence[int] | ir.Graph


class GraphBuilder:
    """Collects the nodes and initializers of a graph for a model."""

    def __init__(self, model: nn.Module, opset: int) -> None:
        """Makes an empty graph.

        Args:
            model: has the parameters that will be asked for.
            opset: version of the ONNX operators.
        """
        self.opset = opset
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="graph")
        self._tape = Tape(self.graph)
        self._names = {module: name for name, module in model.named_modules()}
        self._initializers: dict[str, ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Returns the only output of a new node."""
        return self._tape.op(op_type, inputs, attributes)

    def op_multi_out(
        self, op_type: str, inputs: Sequence[ir.Value | None], *, outputs: int, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Returns the outputs of a new node."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int = -1) -> Sequence[ir.Value]:
        """Returns the parts of x along an axis, of these sizes."""
        ends = self.constant(np.array(sizes, np.int64))
        return self._tape.op_multi_out("Split", [x, ends], {"axis": axis}, num_outputs=len(sizes))

    def reshape(self, x: ir.Value, *sizes: int) -> ir.Value:
        """Returns x in another shape; -1 is the batch."""
        return self.op("Reshape", x, self.constant(np.array(sizes, np.int64)))

    def transpose(self, x: ir.Value, *axes: int) -> ir.Value:
        """Returns x with its axes in another order."""
        return self.op("Transpose", x, perm=axes)

    def reduce(self, how: str, x: ir.Value, *, axis: int, keepdims: int = 0) -> ir.Value:
        """Returns the "Mean" or "Max" of x over one axis."""
        if self.opset >= REDUCE_OPSET:
            return self.op(f"Reduce{how}", x, self.constant(np.array([axis])), keepdims=keepdims)
        return self.op(f"Reduce{how}", x, axes=[axis], keepdims=keepdims)

    def name_of(self, module: nn.Module) -> str:
        """Returns the name of a module of the model."""
        name: str = self._names[module]
        return name

    def parameter(self, module: nn.Module, key: str) -> ir.Value | None:
        """Returns a parameter or buffer of a module under its own name; None where it has none."""
        tensor: Tensor | None = getattr(module, key)
        return (
            None if tensor is None else self.initializer(f"{self._names[module]}.{key}".lstrip("."), tensor)
        )

    def constant(self, value: float | NDArray[np.generic], name: str = "") -> ir.Value:
        """Returns a constant; equal ones without a name are one."""
        array = np.asarray(value, np.float32) if isinstance(value, float) else value
        known = name or f"{array.dtype}{list(array.shape)}{array.tobytes().hex()}"
        if known not in self._initializers:
            made = name or f"constant_{len(self._initializers)}"
            self._initializers[known] = self._tape.initializer(ir.tensor(array, name=made))
        return self._initializers[known]

    def initializer(self, name: str, tensor: Tensor) -> ir.Value:
        """Returns a tensor as a constant of this name."""
        if name not in self._initializers:
            array = tensor.detach().cpu().numpy()
            self._initializers[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._initializers[name]

    def include(self, module: nn.Module, images: ir.Value, spec: InputSpec) -> ir.Value:
        """Returns the output of a module of images as torch.export has it, its parameters under their names.

        Raises:
            UncoveredModuleError: the opset is too low for torch.
            UnsupportedModelError: torch cannot export the module.
        """
        prefix = self._names[module]
        if self.opset < MIN_TRACED_OPSET:
            raise UncoveredModuleError(prefix, module)
        traced = trace(module, spec, opset=self.opset, output=f"{prefix}.output").graph
        output = traced.outputs[0]
        traced.inputs[0].replace_all_uses_with(images)
        traced.outputs.clear()
        for name, value in list(traced.initializers.items()):
            del traced.initializers[name]
            value.name = f"{prefix}.{name}"
            self.graph.register_initializer(value)
        nodes = list(traced)
        traced.remove(nodes)
        self.graph.extend(nodes)
        return output

    def linear(self, layer: nn.Module, rows: ir.Value) -> ir.Value:
        """Returns rows [R, I] → [R, O]: one Gemm, two for factors, none for an identity.

        Raises:
            UncoveredModuleError: the layer is something else.
        """
        if type(layer) is nn.Identity:
            return rows
        if type(layer) is SubspaceLinear:
            code = self.op("Gemm", rows, self.parameter(layer, "right"), transB=1)
            weight = self.parameter(layer, "left")
        elif type(layer) is nn.Linear:
            code, weight = rows, self.parameter(layer, "weight")
        else:
            raise UncoveredModuleError(self.name_of(layer), layer)
        bias = self.parameter(layer, "bias")
        return self.op("Gemm", code, weight, *([] if bias is None else [bias]), transB=1)

    def rms_norm(self, x: ir.Value, weight: ir.Value | None, eps: float) -> ir.Value:
        """Returns x / √(mean(x²) + eps) · weight, over the last axis."""
        if self.opset >= RMS_NORM_OPSET and weight is not None:
            return self.op("RMSNormalization", x, weight, epsilon=eps, axis=-1)
        mean = self.reduce("Mean", self.op("Mul", x, x), axis=-1, keepdims=1)
        normalised = self.op("Div", x, self.op("Sqrt", self.op("Add", mean, self.constant(eps))))
        return normalised if weight is None else self.op("Mul", normalised, weight)

    def gelu(self, x: ir.Value, *, tanh: bool = False) -> ir.Value:
        """Returns x·Φ(x), exact or by the usual approximation with a tanh."""
        if self.opset >= GELU_OPSET:
            return self.op("Gelu", x, approximate="tanh" if tanh else "none")
        if tanh:
            cubic = self.op("Mul", self.op("Mul", x, x), self.op("Mul", x, self.constant(0.044715)))
            inner = self.op("Mul", self.op("Add", x, cubic), self.constant(math.sqrt(2 / math.pi)))
            share = self.op("Tanh", inner)
        else:
            share = self.op("Erf", self.op("Div", x, self.constant(math.sqrt(2))))
        doubled = self.op("Mul", x, self.op("Add", share, self.constant(1.0)))
        return self.op("Mul", doubled, self.constant(0.5))

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, *, heads: int, head_dim: int, one_query: bool = False
    ) -> ir.Value:
        """Returns softmax(q·kᵀ/√D)·v of all heads, each of D = head_dim.

        Args:
            q: [B, M, H·D].
            k: [B, N, H·D].
            v: [B, N, H·E].
            heads: H.
            head_dim: D.
            one_query: q is [1, M, H·D], the same for the whole batch, which the operator does not take.
        """
        if self.opset >= ATTENTION_OPSET and not one_query:
            return self.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads)
        scaled = self.op("Mul", q, self.constant(head_dim**-0.5))
        products = self.op("MatMul", self._heads(scaled, heads), self._heads(k, heads, (0, 2, 3, 1)))
        mixed = self.op("MatMul", self.op("Softmax", products, axis=-1), self._heads(v, heads))
        return self.op("Reshape", self.transpose(mixed, 0, 2, 1, 3), self.constant(np.array([0, 0, -1])))

    def _heads(self, x: ir.Value, heads: int, axes: Sequence[int] = (0, 2, 1, 3)) -> ir.Value:
        split = self.op("Reshape", x, self.constant(np.array([0, 0, heads, -1])))
        return self.transpose(split, *axes)
