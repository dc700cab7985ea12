"""The launcher's memory of kernels; that it starts them rightly is seen by every kernel's test on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lshv2 import launch as launcher

pytest.importorskip("triton")


class Kernel:
    """Stands in for a JITFunction, which needs a GPU: notes what is compiled, and what is run."""

    arg_names = ("x", "n", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple[int, int]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_run(x: torch.Tensor, n: int, BLOCK: int) -> Any:
            self.compiled.append((n, BLOCK))
            return SimpleNamespace(run=lambda *given: self.ran.append(given), function=7, packed_metadata=8)

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    active = SimpleNamespace(get_current_stream=lambda device: 9)
    driver = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(launcher, "triton", SimpleNamespace(JITFunction=Kernel, runtime=driver))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "KEPT", 3)
    return Kernel()


def test_a_call_seen_before_goes_straight_to_the_compiled_kernel(kernel: Kernel) -> None:
    x = torch.zeros(4)
    for _ in range(3):
        launcher.launch(kernel, (2, 1, 1), (x,), (5,), BLOCK=16)
    assert kernel.compiled == [(5, 16)]
    assert kernel.ran == 2 * [(2, 1, 1, 9, 7, 8, None, None, None, x.data_ptr(), 5, 16)]


@pytest.mark.parametrize(("numbers", "block", "x"), [
    ((6,), 16, torch.zeros(4)), ((5,), 32, torch.zeros(4)), ((5,), 16, torch.zeros(4, dtype=torch.float64)),
    ((5,), 16, torch.zeros(5)[1:]),
], ids=["number", "constant", "dtype", "alignment"])
def test_whatever_triton_would_specialise_on_is_compiled_anew(
    kernel: Kernel, numbers: tuple[int, ...], block: int, x: torch.Tensor
) -> None:
    launcher.launch(kernel, (2, 1, 1), (torch.zeros(4),), (5,), BLOCK=16)
    launcher.launch(kernel, (2, 1, 1), (x,), numbers, BLOCK=block)
    assert len(kernel.compiled) == 2 and not kernel.ran


def test_ever_new_lengths_do_not_fill_the_memory(kernel: Kernel) -> None:
    for n in range(10):
        launcher.launch(kernel, (1, 1, 1), (torch.zeros(4),), (n,), BLOCK=16)
        assert 1 <= len(launcher._compiled) <= 3
    launcher.launch(kernel, (1, 1, 1), (torch.zeros(4),), (9,), BLOCK=16)
    assert len(kernel.compiled) == 10 and len(kernel.ran) == 1, "the newest is known"
