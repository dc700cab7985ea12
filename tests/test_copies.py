"""Many tensors copied in one launch: all values, whatever dtype, layout or number, and not one beside them."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, laid_out
from torch import Tensor

pytest.importorskip("triton")
from lshv2.attention.kernels.copies import BLOCK, SLOTS, copy_all

DTYPES = [torch.bfloat16, torch.float32, torch.int16, torch.int32, torch.float16]
SIZES = [1, 0, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 16, 7]


def numbers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, (n,), generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("count", [1, 3, SLOTS, SLOTS + 1, 2 * SLOTS + 5])
def test_all_are_copied_and_nothing_beside_them(count: int) -> None:
    drawn = [numbers(SIZES[i % len(SIZES)], DTYPES[i % len(DTYPES)], i) for i in range(count)]
    guarded = [torch.full((len(x) + 32,), 111, dtype=x.dtype, device=DEVICE) for x in drawn]
    copy_all([whole[16:-16] for whole in guarded], drawn)
    for whole, source in zip(guarded, drawn, strict=True):
        assert torch.equal(whole[16:-16], source)
        assert (whole[:16] == 111).all() and (whole[-16:] == 111).all(), "numbers beside the target were written"


def test_any_layout_is_copied() -> None:
    base = numbers(2 * 6 * 50 * 8, torch.float32, 0).view(2, 6, 50, 8)
    sources = [laid_out(base, 0, 2, 1, 3), base[:, ::2], base[..., :5], base[:, :1].expand(2, 6, 50, 8), base[:0]]
    targets = [torch.empty_like(x) for x in sources]
    copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)
    assert targets[0].stride() == sources[0].stride()


def test_as_many_targets_as_sources() -> None:
    with pytest.raises(ValueError):
        copy_all([], [numbers(3, torch.int32, 0)])
