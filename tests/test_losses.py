"""The head's cross-entropy, its gradients made in the forward, against torch's of all logits at once in float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Largest
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from lshv2.hashing import has_triton
from lshv2.losses import CHUNK_ELEMENTS, IGNORE, linear_cross_entropy, row_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


def drawn(rows: int, dim: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [rows,dim], weight [size,dim], labels, every seventh of them ignored, and scale [rows]."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, scale = (torch.randn(s, generator=g, dtype=dtype) for s in ((rows, dim), (size, dim), (rows,)))
    labels = torch.randint(0, size, (rows,), generator=g)
    labels[::7] = IGNORE
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE), scale.to(DEVICE)


def by_torch(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    nats = cross_entropy((hidden @ weight.T).to(scale.dtype), labels, ignore_index=IGNORE, reduction="none")
    return (nats * scale).sum(), nats


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many tokens a chunk, whatever the vocabulary."""
    monkeypatch.setattr("lshv2.losses.MIN_ROWS", rows)
    monkeypatch.setitem(CHUNK_ELEMENTS, DEVICE, 0)


@pytest.mark.parametrize("rows", [64, 50, 10, 7], ids=["fewer than a chunk", "one", "even chunks", "uneven chunks"])
def test_values_and_gradients_are_torch_s(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden, weight and scale learn, through a sum that is itself weighed by 3; a second backward finds the same."""
    chunks_of(rows, monkeypatch)
    hidden, weight, labels, scale = drawn(50, 8, 20)
    results = []
    for function in (linear_cross_entropy, by_torch):
        h, w, s = (x.clone().requires_grad_() for x in (hidden, weight, scale))
        loss, nats = function(h, w, labels, s)
        first = torch.autograd.grad(3 * loss, (h, w, s), retain_graph=True)
        second = torch.autograd.grad(3 * loss, (h, w, s))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append([loss.detach(), nats.detach(), *second])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12 * 50 * 20
    assert (results[0][1][::7] == 0).all() and (results[0][2][::7] == 0).all(), "what is ignored is exactly nothing"


def test_views_are_read_as_what_they_show_and_a_tied_head_learns_by_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden is a transposed and strided view made of the head's own weight, scale one number for all tokens."""
    chunks_of(7, monkeypatch)
    turn = drawn(8, 50, 20)[0]
    _, weight, labels, scale = drawn(50, 8, 20)
    results = []
    for function in (linear_cross_entropy, by_torch):
        w, s = weight.clone().requires_grad_(), scale[:1].clone().requires_grad_()
        hidden = (w[:8] @ turn).repeat_interleave(2, 1)[:, ::2].T
        assert not hidden.is_contiguous()
        loss, nats = function(hidden, w, labels.repeat_interleave(2)[::2], s.expand(50))
        results.append([nats, *torch.autograd.grad(loss, (w, s))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("rows", [64, 7])
def test_exits_with_learned_weights_give_the_gradients_of_their_weighted_sum(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ponder's: each exit's state follows from the one before, and its weights from the state."""
    chunks_of(rows, monkeypatch)
    start, weight, labels, _ = drawn(50, 8, 20)
    move, chooser = drawn(8, 8, 20)[0], drawn(8, 1, 20)[0]
    results = []
    for function in (linear_cross_entropy, by_torch):
        leaves = [x.clone().requires_grad_() for x in (start, weight, move, chooser)]
        h, w, m, c = leaves
        states = [h := torch.tanh(h @ m) for _ in range(3)]
        weights = torch.cat([state @ c for state in states], 1).softmax(1).T
        loss = sum(function(state, w, labels, p)[0] for state, p in zip(states, weights, strict=True))
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_under_autocast_the_error_is_that_of_torch() -> None:
    """bfloat16 products against float64: gradients come in the parameters' dtype, as far off as torch's."""
    inputs = drawn(300, 64, 100, torch.float32)
    results = []
    for function in (linear_cross_entropy, by_torch, None):
        h, w, s = (x.clone().to(torch.float64 if function is None else x.dtype).requires_grad_()
                   for x in (*inputs[:2], inputs[3]))
        if function is None:
            loss, _ = by_torch(h, w, inputs[2], s)
        else:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss, _ = function(h, w, inputs[2], s)
        results.append(torch.autograd.grad(3 * loss, (h, w, s)))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (ours, theirs)]
        assert errors[1] / 2 < errors[0] < 1.25 * errors[1], errors


def test_logits_are_computed_once_and_no_gradient_where_nothing_learns() -> None:
    hidden, weight, labels, scale = drawn(40, 8, 20)
    product = 2 * 40 * 8 * 20
    with FlopCounterMode(display=False) as counter:
        loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, scale)
        loss.backward()
    assert counter.get_total_flops() == 3 * product, "the logits, and what they give to hidden and to weight"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss, nats = linear_cross_entropy(hidden, weight, labels, scale)
    assert counter.get_total_flops() == product and not loss.requires_grad
    exact = by_torch(hidden, weight, labels, scale)
    assert (loss - exact[0]).abs() < 1e-10 and (nats - exact[1]).abs().max() < 1e-12


@pytest.mark.parametrize("autocast", [False, True])
def test_no_buffer_of_all_logits_is_made(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward, backward nor what is kept between: all logits would be 20 times the largest."""
    rows, dim, size = 4000, 16, 320
    chunks_of(200, monkeypatch)
    hidden, weight, labels, scale = drawn(rows, dim, size, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), scale.requires_grad_()
    with Largest() as largest, torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        linear_cross_entropy(*leaves[:2], labels, leaves[2])[0].backward()
    assert largest.bytes <= 4 * max(200 * size, rows * dim, size * dim)
    assert all(x.grad is not None for x in leaves)


def test_no_tokens_and_no_scored_tokens_are_a_loss_of_zero() -> None:
    for rows in (0, 5):
        hidden, weight, labels, scale = drawn(rows, 8, 20)
        leaves = hidden.requires_grad_(), weight.requires_grad_(), scale.requires_grad_()
        loss, nats = linear_cross_entropy(*leaves[:2], labels.fill_(IGNORE), leaves[2])
        loss.backward()
        assert loss.item() == 0 and nats.shape == (rows,) and not nats.any()
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in leaves)


@pytest.mark.parametrize("which", [0, 1, 3], ids=["hidden", "weight", "scale"])
def test_each_may_learn_alone(which: int) -> None:
    results = []
    for function in (linear_cross_entropy, by_torch):
        inputs = [*drawn(30, 8, 20)]
        loss, _ = function(*inputs[:which], inputs[which].requires_grad_(), *inputs[which + 1 :])
        results.append(torch.autograd.grad(loss, inputs[which])[0])
    assert (results[0] - results[1]).abs().max() < 1e-10


def test_a_second_derivative_is_refused() -> None:
    """It would be missing from the result without a word: what the first one is made of are constants."""
    hidden, weight, labels, scale = drawn(5, 8, 20)
    loss, nats = linear_cross_entropy(hidden.requires_grad_(), weight, labels, scale)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert not nats.requires_grad


def test_bits_do_not_change_from_call_to_call_and_the_backward_rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(512, monkeypatch)
    inputs = drawn(2000, 64, 1000, torch.float32)
    results = []
    for factor in (1, 3):
        h, w = (x.clone().requires_grad_() for x in inputs[:2])
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, nats = linear_cross_entropy(h, w, *inputs[2:])
        results.append([loss.detach(), nats, *torch.autograd.grad(factor * loss, (h, w))])
    (*values, d_hidden, d_weight), (*others, d_hidden_3, d_weight_3) = results
    assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    assert torch.equal(3 * d_hidden, d_hidden_3) and torch.equal(3 * d_weight, d_weight_3)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 61, 512, 20_000])
def test_the_kernel_is_the_definition(dtype: torch.dtype, size: int) -> None:
    """Rows narrower than a tile and wider than two, at the size of logits that a trained model gives."""
    from lshv2.losses_kernel import row_losses_triton

    g = torch.Generator().manual_seed(size)
    logits = (8 * torch.randn(9, size, generator=g)).to(dtype).to(DEVICE)
    labels = torch.randint(0, size, (9,), generator=g)
    labels[0], labels[1], labels[2] = size - 1, 0, IGNORE
    labels, scale = labels.to(DEVICE), torch.randn(9, generator=g).to(DEVICE)
    before, exact = logits.clone(), logits.double()
    wanted = row_losses(exact, labels, scale)  # float64 is torch's
    alone = row_losses_triton(logits, labels, None, IGNORE)
    gradient = logits.clone()
    nats = row_losses_triton(gradient, labels, scale, IGNORE)
    assert torch.equal(nats, alone) and torch.equal(logits, before), "without scale the logits stay"
    assert (nats - wanted).abs().max() < 1e-4
    assert not gradient[2].any()
    # half a unit in the last place, a whole one where the interpreter cuts float32 off to bfloat16
    rounding = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
    error = (gradient.double() - exact).abs().max() / exact.abs().max().clamp_min(1)
    assert error < rounding[dtype] + 1e-5, error


@needs_triton
def test_the_kernel_serves_chunks_of_any_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, from hidden to gradients; here the kernel through Triton's interpreter."""
    from lshv2.losses_kernel import row_losses_triton

    monkeypatch.setattr("lshv2.losses.row_losses", lambda *given: row_losses_triton(*given, IGNORE))
    chunks_of(7, monkeypatch)
    hidden, weight, labels, scale = drawn(30, 8, 20, torch.float32)
    results = []
    for function in (linear_cross_entropy, by_torch):
        h, w, s = (x.clone().requires_grad_() for x in (hidden, weight, scale[:1]))
        loss, nats = function(h, w, labels.repeat_interleave(2)[::2], s.expand(30))
        results.append([loss.detach(), nats.detach(), *torch.autograd.grad(3 * loss, (h, w, s))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
