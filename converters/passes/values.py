"""What passes ask of the values of a graph."""

import math

import onnx_ir as ir


def integers(value: ir.Value | None) -> list[int] | None:
    """Returns the numbers of a constant of integers, flat; None where it is computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def sizes(value: ir.Value | None) -> list[int]:
    """Returns the sizes of a value, -1 for those that are not static; none where its shape is not known."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else -1 for size in value.shape]


def count(numbers: list[int]) -> int | None:
    """Returns the product of sizes; None where one is not static."""
    return None if -1 in numbers else math.prod(numbers)


def is_own_parameter(value: ir.Value | None) -> bool:
    """Returns whether a value is an initializer that one node uses."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Returns the node that gives a value, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Returns the node that alone uses a value, if it is of this kind."""
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not users[0].domain else None
