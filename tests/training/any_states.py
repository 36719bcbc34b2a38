"""Hypothesis strategy for every state that a checkpoint can hold."""

import torch
from hypothesis import strategies as st
from torch import nn

from gengrad.training.state import DTYPES


@st.composite
def tensors(draw):
    """Random bits of every dtype and of up to three dimensions, also empty, transposed, sliced and expanded ones."""
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = torch.empty(0, dtype=dtype).element_size()
    random_bytes = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    tensor = (random_bytes % 2).bool()[..., 0] if dtype is torch.bool else random_bytes.view(dtype)[..., 0]
    kind = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "parameter"]))
    if kind == "transposed" and tensor.dim():
        return tensor.transpose(0, -1)
    if kind == "sliced" and tensor.dim():
        return tensor[:, ..., 1:] if tensor.dim() > 1 else tensor[::2]
    if kind == "expanded":
        return tensor.expand(2, *tensor.shape)
    return nn.Parameter(tensor) if kind == "parameter" and dtype.is_floating_point else tensor


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
keys = st.sampled_from(["$tensor", "$", "$$a", "a/b", "a", "b", "", "~1", "/", "__metadata__", "0"]) | st.text()
leaves = scalars | tensors()
states = st.dictionaries(
    keys,
    st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(keys, v, max_size=4), max_leaves=12),
    max_size=5,
)


def plain(value):
    """What comes back: parameters as tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
