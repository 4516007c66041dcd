"""The messages of an ONNX file, as far as they are looked at; the base install has no onnx.

Field numbers are for ever in protobuf, and fields that are not named here are skipped. A _STRING that is read
nowhere is named because protobuf then refuses what is no UTF-8; onnx would give it to its readers as bytes,
where they expect text.
Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_F = descriptor_pb2.FieldDescriptorProto
_INT32, _INT64, _UINT64 = _F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT64
_FLOAT, _DOUBLE, _STRING, _BYTES = _F.TYPE_FLOAT, _F.TYPE_DOUBLE, _F.TYPE_STRING, _F.TYPE_BYTES
_PACKAGE = "wasi_export.onnx"

# Message → field → number, type (a message's name or a scalar), repeated.
_MESSAGES: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "Model": {
        "ir_version": (1, _INT64, False),
        "graph": (7, "Graph", False),
        "opset_import": (8, "OperatorSet", True),
        "training_info": (20, _BYTES, True),
        "functions": (25, _BYTES, True),
    },
    "OperatorSet": {"domain": (1, _STRING, False), "version": (2, _INT64, False)},
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Tensor", True),
        "input": (11, "Value", True),
        "output": (12, "Value", True),
        "value_info": (13, "Value", True),
        "sparse_initializer": (15, _BYTES, True),
    },
    "Node": {
        "input": (1, _STRING, True),
        "output": (2, _STRING, True),
        "name": (3, _STRING, False),
        "op_type": (4, _STRING, False),
        "attribute": (5, "Attribute", True),
        "domain": (7, _STRING, False),
    },
    "Attribute": {
        "name": (1, _STRING, False),
        "f": (2, _FLOAT, False),
        "t": (5, "Tensor", False),
        "g": (6, "Graph", False),
        "floats": (7, _FLOAT, True),
        "tensors": (10, "Tensor", True),
        "graphs": (11, "Graph", True),
        "sparse_tensor": (22, _BYTES, False),
        "sparse_tensors": (23, _BYTES, True),
    },
    "Tensor": {
        "dims": (1, _INT64, True),
        "data_type": (2, _INT32, False),
        "segment": (3, _BYTES, True),
        "float_data": (4, _FLOAT, True),
        "int32_data": (5, _INT32, True),
        "string_data": (6, _BYTES, True),
        "int64_data": (7, _INT64, True),
        "name": (8, _STRING, False),
        "raw_data": (9, _BYTES, False),
        "double_data": (10, _DOUBLE, True),
        "uint64_data": (11, _UINT64, True),
        "external_data": (13, _BYTES, True),
        "data_location": (14, _INT32, False),
    },
    "Value": {"name": (1, _STRING, False), "type": (2, "Type", False)},
    "Type": {"tensor_type": (1, "TensorType", False)},
    "TensorType": {"shape": (2, "Shape", False)},
    "Shape": {"dim": (1, "Dimension", True)},
    "Dimension": {"dim_value": (1, _INT64, False), "dim_param": (2, _STRING, False)},
}


def _model_class() -> Any:
    """Returns the class of the message of a whole file."""
    file = descriptor_pb2.FileDescriptorProto(
        name="wasi_export/onnx.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            entry = message.field.add(name=field, number=number)
            entry.label = _F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL
            if isinstance(kind, str):
                entry.type, entry.type_name = _F.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                entry.type = kind
    pool = descriptor_pool.DescriptorPool()  # of its own: the default one may hold the messages of onnx
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


OnnxModel = _model_class()
