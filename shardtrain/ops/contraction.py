"""The island that convolutions and locally connected layers share: an input, a kernel and a bias."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from shardtrain.layout import AnyMesh, Axes, Layout, axes_of, spec
from shardtrain.ops import island
from shardtrain.ops.channels import ChannelPlan
from shardtrain.ops.reshard import Cuts, move
from shardtrain.ops.window import Window

CONTRACTION = "contraction"
"""Name of convolution and linear outputs, for remat policies that keep them and recompute the rest."""


@dataclass(frozen=True)
class ContractionPlan(ABC):
    """One contraction on one mesh: how every array is sharded, and what a device does with its shards.

    Calling the plan with the global arrays runs the island. A subclass defines `contract`, which one device
    computes from its shards; masking, gathering the parameters and adding the bias are the same for all.

    Attributes:
        layout: which mesh axes cut what.
        mesh: the active mesh, None on one device.
        windows: the window of every spatial dimension, with the axes that cut it.
        channels: what travels on the axes that cut the channels.
        shape: of the global input.
        kernel_shape: of the global kernel.
        pixel_dims: how many leading dimensions of kernel and bias are pixels of the output.
    """

    layout: Layout
    mesh: AnyMesh | None
    windows: tuple[Window, ...]
    channels: ChannelPlan
    shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    pixel_dims: int

    @abstractmethod
    def contract(self, x: Array, kernel: Array) -> Array:
        """One device's block of the output without the bias, from its block of the input and its filters."""

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Shape of the global output."""
        return (self.shape[0], *(w.extent_out for w in self.windows), self.kernel_shape[-1])

    @property
    def space(self) -> Cuts:
        """Axes that cut every spatial dimension."""
        return tuple(w.axes for w in self.windows)

    @property
    def cuts_in(self) -> Cuts:
        """Axes that cut every dimension of the input."""
        return (self.layout.cut("batch", self.mesh), *self.space, self.channels.cut_in)

    @property
    def cuts_out(self) -> Cuts:
        """Axes that cut every dimension of the output."""
        return (self.layout.cut("batch", self.mesh), *self.space, self.channels.cut_out)

    @property
    def varying(self) -> Axes:
        """Axes over which devices have different examples or pixels: parameter gradients are summed there."""
        return tuple(axis for axes in self.cuts_in[:-1] for axis in axes)

    def __call__(self, x: Array, kernel: Array, bias: Array | None) -> Array:
        """The whole contraction on global arrays."""
        if self.mesh is None:
            return checkpoint_name(self._on_device(x, kernel, bias), CONTRACTION)
        kernel = self._place(kernel, self.channels.kernel_dim)
        bias = None if bias is None else self._place(bias, -1)
        y = island.run(
            self._on_device,
            self.mesh,
            (spec(self.cuts_in), self._kernel_spec, None if bias is None else self._bias_spec),
            spec(self.cuts_out),
            island.pad_to_blocks(x, self.cuts_in, self.mesh),
            self._fill_pixels(kernel),
            None if bias is None else self._fill_pixels(bias),
        )
        return checkpoint_name(island.crop_to(y, self.shape_out), CONTRACTION)

    def _on_device(self, x: Array, kernel: Array, bias: Array | None) -> Array:
        x = island.mask_padding(x, self.shape, self.cuts_in, self.mesh)
        y = self.contract(x, self._gather(kernel, self._kernel_spec))
        if bias is not None:
            y = y + self._gather(bias, self._bias_spec)
        return island.mask_padding(y, self.shape_out, self.cuts_out, self.mesh)

    @property
    def _kernel_spec(self) -> P:
        return self._spec(self.kernel_shape, self.channels.kernel_dim)

    @property
    def _bias_spec(self) -> P:
        return self._spec((*self.kernel_shape[: self.pixel_dims], self.kernel_shape[-1]), -1)

    def _spec(self, shape: tuple[int, ...], channel_dim: int) -> P:
        """How a parameter enters the island: as it is stored, but with its pixels cut as the output's are."""
        stored = island.stored_spec(self.layout, shape, channel_dim, self.mesh, self.pixel_dims)
        return P(*spec(self.space[: self.pixel_dims]), *stored[self.pixel_dims :])

    def _place(self, parameter: Array, channel_dim: int) -> Array:
        """The parameter as `_spec` cuts it; pixels that do not divide by their axes are stored whole."""
        stored = island.stored_spec(self.layout, parameter.shape, channel_dim, self.mesh, self.pixel_dims)
        wanted = self._spec(parameter.shape, channel_dim)
        return move(parameter, tuple(map(axes_of, stored)), tuple(map(axes_of, wanted)))

    def _fill_pixels(self, parameter: Array) -> Array:
        """The parameter with its pixels padded to whole blocks; its channels divide where they are cut."""
        others: Cuts = ((),) * (parameter.ndim - self.pixel_dims)
        return island.pad_to_blocks(parameter, (*self.space[: self.pixel_dims], *others), self.mesh)

    def _gather(self, parameter: Array, stored: P) -> Array:
        return island.gather(parameter, stored, self.layout, self.varying, self.pixel_dims)
