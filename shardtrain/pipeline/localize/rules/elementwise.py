"""Operations that compute each element from the same elements of their operands, and random numbers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardtrain import jaxprs
from shardtrain.pipeline.localize.block import Block, Cut, finest


def elementwise(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Computes on operands with the finest of their cuts; a dimension of extent 1 stays whole."""
    shape = equation.outvars[0].aval.shape

    def cut_of(b: Block, cut: Cut) -> Cut:
        return tuple(c if n == m else () for c, n, m in zip(cut, b.shape, shape, strict=True))

    cut = finest([((),) * len(shape), *(cut_of(b, b.cut) for b in blocks if b.shape)])
    values = [b.moved(cut_of(b, cut)).value if b.shape else b.value for b in blocks]
    return [replace(blocks[0], value=v, shape=shape, cut=cut) for v in jaxprs.rebind(equation, values)]


def leading(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Computes where operand and result share leading dimensions, and the trailing ones are one element."""
    (x,) = blocks
    shape = equation.outvars[0].aval.shape
    shared = min(len(shape), len(x.shape))
    x = x.whole_on(range(shared, len(x.shape)))
    cut = (*x.cut[:shared], *((),) * (len(shape) - shared))
    return [replace(x, value=v, shape=shape, cut=cut) for v in jaxprs.rebind(equation, [x.value])]


# fmt: off
_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type",
    "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le",
    "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi",
    "ne", "neg", "nextafter", "not", "one_minus_square", "or", "polygamma", "polynomial",
    "population_count", "pow", "random_clone", "random_fold_in", "random_gamma", "random_seed", "real",
    "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
)
_LEADING = ("bitcast_convert_type", "random_bits", "random_split", "random_unwrap", "random_wrap")
# fmt: on

RULES = {**dict.fromkeys(_ELEMENTWISE, elementwise), **dict.fromkeys(_LEADING, leading)}
