"""Recordings of short calls: the plain call's bits whatever comes between, bounded, and given up where memory is short.

Skipped without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, RESULTS, draw, out_and_grads
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("default::UserWarning"),
]
SIZES: dict[str, Any] = dict(n_buckets=32, bucket_size=64, window=96, n_global=4)


@pytest.fixture
def replay() -> Iterator[Any]:
    from lshv2.attention.kernels import replay

    replay.forget()
    yield replay
    replay.forget()


def tensors_of(seed: int, length: int = 1000, one_table: bool = True) -> tuple[Tensor, ...]:
    return tuple(draw(seed, 2, 6, 2, length, 64, 4, 32, dtype=torch.bfloat16, one_table=one_table))


def recordings(replay: Any) -> int:
    return sum(not isinstance(x, int) for x in replay._known.values())


def plain(monkeypatch: pytest.MonkeyPatch, replay: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(replay, "SHORT", 0)
        return list(out_and_grads("triton", tensors, **SIZES))


def assert_same_bits(got: Any, want: Any) -> None:
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), f"{name} differs"


@pytest.mark.parametrize("one_table", [False, True])
def test_a_recording_has_the_plain_calls_bits(
    replay: Any, monkeypatch: pytest.MonkeyPatch, one_table: bool
) -> None:
    drawn = [tensors_of(seed, one_table=one_table) for seed in range(6)]
    want = [plain(monkeypatch, replay, tensors) for tensors in drawn]
    got = [out_and_grads("triton", tensors, **SIZES) for tensors in drawn]
    assert recordings(replay) == 2, "a forward and a backward"
    for one, other in zip(got, want, strict=True):  # after all calls: nothing may be written over
        assert_same_bits(one, other)


def test_layers_forward_before_any_goes_backward(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model does: many forwards of one shape, of two streams even, then their backwards in reverse."""
    from lshv2.attention import lsh_attention

    drawn = [tensors_of(seed) for seed in range(5)]
    want = [plain(monkeypatch, replay, tensors) for tensors in drawn]
    for _ in range(3):
        outs = [lsh_attention(q, k, v, a, b, **SIZES) for q, k, v, _, a, b in drawn]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            q, k, v, grad, a, b = drawn[0]
            elsewhere = [lsh_attention(q, k, v, a, b, **SIZES) for _ in range(4)]
        torch.cuda.current_stream().wait_stream(side)
        grads = [torch.autograd.grad(out, x[:3], x[3]) for out, x in reversed(list(zip(outs, drawn, strict=True)))]
        for out, gradients, expected in zip(outs, reversed(grads), want, strict=True):
            assert_same_bits([out, *gradients], expected)
        assert all(torch.equal(out, want[0][0]) for out in elsewhere)
    assert recordings(replay) >= 3


def test_inference_mode_and_training_share_a_recording(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lshv2.attention import lsh_attention

    q, k, v, grad, a, b = tensors = tensors_of(0)
    want = plain(monkeypatch, replay, tensors)
    with torch.inference_mode():
        for _ in range(4):
            inferred = lsh_attention(q, k, v, a, b, **SIZES)
    assert recordings(replay) == 1 and torch.equal(inferred, want[0])
    for _ in range(4):
        assert_same_bits(out_and_grads("triton", tensors, **SIZES), want)
    with torch.inference_mode():
        assert torch.equal(lsh_attention(q, k, v, a, b, **SIZES), want[0])


def test_lengths_that_do_not_come_back_are_not_recorded(replay: Any) -> None:
    for length in range(100, 100 + replay.KEPT + 5):
        out_and_grads("triton", tensors_of(0, length), **SIZES)
    assert not recordings(replay) and len(replay._known) <= replay.KEPT


def test_recordings_come_and_go(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those pushed out free their memory, and the rest go on working."""
    monkeypatch.setattr(replay, "KEPT", 4)
    torch.cuda.synchronize()
    for length in (300, 400, 500, 300, 400, 500):
        tensors = tensors_of(length, length)
        want = plain(monkeypatch, replay, tensors)
        for _ in range(4):
            assert_same_bits(out_and_grads("triton", tensors, **SIZES), want)
        assert recordings(replay) <= 4


def test_without_memory_for_a_recording_the_call_goes_on(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of(0)
    want = plain(monkeypatch, replay, tensors)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")  # said by hand: a GPU full at just this point is hard to arrange

    monkeypatch.setattr(replay, "_Recording", type("Full", (), {"__init__": full}))
    for _ in range(5):
        assert_same_bits(out_and_grads("triton", tensors, **SIZES), want)
    assert all(isinstance(x, int) for x in replay._known.values())
