"""Activation functions with parameters."""

from flax import nnx
from jax import Array
from jaxtyping import Float

from shardtrain.nn.base import Partitioned, in_layout


class PReLU(Partitioned, nnx.PReLU):
    """`nnx.PReLU`: inputs below zero are multiplied by a slope that is learned; every device keeps it.

    Args:
        args: positional arguments of `nnx.PReLU`.
        kwargs: keyword arguments of `nnx.PReLU`.

    Example:
        >>> st.nn.PReLU(0.5)(jnp.array([[-2.0, 3.0]]))
        Array([[-1.,  3.]], dtype=float32)

    References:
        He et al., Delving Deep into Rectifiers, ICCV 2015.
    """

    @in_layout
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Inputs of any shape."""
        return super().__call__(inputs)
