"""Steps replayed as CUDA graphs are the eager ones, of each shape; without a GPU they are those steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lshv2 import graphs
from lshv2.graphs import GraphedStep, rate_setter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def losses(warm: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], int]:
    """Thirty steps of two shapes with a rate that falls; and how many graphs there were."""
    monkeypatch.setattr(graphs, "WARM", warm)
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(8, 1).to(DEVICE)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 8, generator=generator))
        model.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, fused=True)
    set_rate = rate_setter(optimizer, DEVICE)

    def one(x: Tensor, y: Tensor) -> Tensor:
        loss = (model(x)[:, 0] - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step, found = GraphedStep(one, DEVICE), []
    for n in range(30):
        x = torch.randn(4 + n % 2, 8, generator=generator)
        set_rate(0.1 * (1 - n / 30))
        found.append(step(x.to(DEVICE), x.sum(-1).to(DEVICE)))
    return torch.stack(found).tolist(), len(step.graphs)


def test_the_learning_rate_is_the_one_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left at the optimizer's own 1.0 the losses would be others."""
    found, _ = losses(10**9, monkeypatch)
    assert found[-1] < 0.5 * found[0]
    monkeypatch.setattr(f"{__name__}.rate_setter", lambda optimizer, device: lambda rate: None)
    other, _ = losses(10**9, monkeypatch)
    assert other[:1] == found[:1] and other[1:] != found[1:]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: CUDA graphs")
def test_captured_steps_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, none = losses(10**9, monkeypatch)
    captured, graphs_made = losses(3, monkeypatch)
    assert (none, graphs_made) == (0, 2) and len(set(captured)) == len(captured), "results are copies"
    assert captured == pytest.approx(eager, rel=1e-5)
