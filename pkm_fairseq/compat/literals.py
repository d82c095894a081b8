"""Read fairseq's options that are Python expressions without running them.

Options can come from checkpoints, and checkpoints from anyone.
"""

import ast
import sys
from typing import Any

SHOWN = 60  # most letters to show of a refused value


def evaluate_literals_only() -> None:
    """Define ``read`` under the name ``eval`` in every module of fairseq.

    There it hides Python's ``eval`` from all functions of the module. Importing fairseq imports
    all modules that evaluate options.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq."):
            vars(module)["eval"] = read


def read(text: Any) -> Any:
    """The value of a Python literal, or of sums and products of literals.

    fairseq writes layers of convolutions as ``[(512, 10, 5)] + [(512, 3, 2)] * 4``.

    Args:
        text: such as ``"0.9, 0.98"``.

    Raises:
        TypeError: the argument is not text; fairseq catches this error of Python's ``eval``.
        ValueError: the text is anything else, such as a call; its code does not run.
    """
    if not isinstance(text, str):
        raise TypeError(f"eval() takes text, not {type(text).__name__}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
        raise ValueError(f"an option is {shown}, must be a Python literal") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left), _value(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right
    return ast.literal_eval(node)
