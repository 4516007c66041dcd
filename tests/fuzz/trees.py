"""Odd documents made of valid ones: a part is changed, and the rest still is what a reader expects.

A document is what JSON and TOML have: mappings, lists and scalars. Text that no such document prints as (a
key twice, a thousand brackets, a number of 5,000 digits) is put in by a mark, see `with_raw`.
"""

import copy
import math
from random import Random
from typing import Any

Tree = Any
Place = tuple[Any, Any]
"""A mapping or a list, and the key or the index in it."""

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 255, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400,
    0.0, -0.0, 0.5, 1e-9, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf,
    "", " ", "a", "A" * 2000, "..", "../x", "../../etc/passwd", "/etc/passwd", "a/../../x", "C:\\x",
    "\\\\host\\x", "CON", ".", "a\0b", "\n", "\x1b[31m", "\u202eevil", "\ud800", "é",
    "<script>alert(1)</script>", "{{7*7}}", "%s%n", "nan", "1e5", "2020-02-30", "model.onnx", "manifest.json",
)  # fmt: skip
RAW: tuple[str, ...] = (
    "[" * 3000, "[" * 3000 + "]" * 3000, '{"a":' * 3000, "9" * 5000, "-" + "9" * 5000, "1e99999",
    "-1e-99999", "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', '{"a":1,"a":2}', "1.",
    "01", "+1", "0x10", "1_0", '"\\u0000"', '"a\tb"', "'a'", "// x\n1",
    "1979-05-27T07:32:00Z", "07:32:00", "",
)  # fmt: skip
TEXTS = tuple(scalar for scalar in SCALARS if isinstance(scalar, str))
_MARK = "raw:{}:raw"


def mutated_tree(tree: Tree, random: Random) -> Tree:
    """Returns a document with one to three changes; the one given is used up."""
    root = {"": tree}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change(root, random)
    return root.get("")


def with_raw(text: str) -> str:
    """Returns the text of a document with what the marks in it stand for."""
    for index, raw in enumerate(RAW):
        text = text.replace(f'"{_MARK.format(index)}"', raw)
    return text


def _change(root: dict[str, Tree], random: Random) -> None:
    """Makes one change of a document in place."""
    parent, key = random.choice(_places(root))
    value = parent[key]
    kind = random.randrange(9)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice((*TEXTS, f"{key}x", str(key).upper()))] = parent.pop(key)
    elif kind == 2:
        parent[key] = _MARK.format(random.randrange(len(RAW)))
    elif kind == 3:
        other, place = random.choice(_places(root))
        parent[key] = copy.deepcopy(other[place])
    elif kind == 4 and isinstance(value, list) and value:
        parent[key] = value * random.choice((2, 3, 50))
    elif kind == 5 and isinstance(value, int | float) and math.isfinite(value):
        parent[key] = random.choice(
            (value + 1, value - 1, -value, value * 10, value * 1e-6, value * 2**40, str(value))
        )
    elif kind == 6 and isinstance(value, str):
        at = random.randint(0, len(value))
        odd = random.choice([scalar for scalar in SCALARS if isinstance(scalar, str)])
        parent[key] = random.choice(
            (value[:at] + odd + value[at:], value[:at], value[at:], value * 2, [value])
        )
    elif kind == 7:
        parent[key] = random.choice(([], {}, [value], {"a": value}))
    else:
        parent[key] = random.choice(SCALARS)


def _places(root: Tree) -> list[Place]:
    """Returns every place of a document that a value stands at."""
    found: list[Place] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found
