"""The model: sizes, losses, causality, checkpointing, compiled blocks, and no global randomness."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import backend, ids, small
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, rms_norm

from lshv2.config import ModelConfig, parse_size
from lshv2.errors import UserError
from lshv2.layers import rotary_angles
from lshv2.model import create_lsh_v2_model
from lshv2.sizes import count_parameters, shape_for

__all__ = ["backend"]  # of model_cases: every test here twice


def test_the_documented_configuration_has_100M_parameters() -> None:
    model = create_lsh_v2_model(vocab_size=32000, target_params="100M")
    assert 98e6 <= sum(p.numel() for p in model.parameters()) <= 103e6
    assert model.config == ModelConfig()
    assert model.count_parameters() == count_parameters(model.config)


@pytest.mark.parametrize("size", ["1M", "2M", "5M", "10M", "20M", "50M", "75M", "125M", "250M", "500M", "760M", "1B"])
@pytest.mark.parametrize("vocab", [256, 2048, 32_000])
def test_sizes_resolve_within_five_percent_or_one_line_says_why(size: str, vocab: int) -> None:
    target = parse_size(size)
    try:
        config = ModelConfig(vocab_size=vocab, **shape_for(target, vocab_size=vocab))
    except UserError as error:
        assert "vocab" in str(error) and "\n" not in str(error)
        assert 2 * vocab * 48 > 0.5 * target, "only a vocabulary that leaves no width may be refused"
        return
    assert abs(count_parameters(config) - target) <= 0.05 * target


def test_a_size_that_no_width_reaches_is_told_from_one_that_the_vocabulary_fills() -> None:
    for target, hint in ((7_000_000_000, "widths end at 4,096: choose a smaller"), (10_000, "choose a larger size")):
        with pytest.raises(UserError, match=hint):
            shape_for(target, vocab_size=32_000)


def test_closed_form_count_equals_the_built_model() -> None:
    others = ({"n_kv_heads": 4}, {"weight_tied_layers": 4}, {"attention": "dense"}, {"short_conv": 3})
    for changes in ({}, {"use_ponder": False}, *others):
        model = small(**changes)
        assert model.count_parameters() == count_parameters(model.config)


def test_create_keeps_overrides_and_refuses_unknown_ones() -> None:
    model = create_lsh_v2_model(512, "1M", n_heads=4, n_kv_heads=2, max_seq_len=512)
    assert (model.config.n_heads, model.config.n_kv_heads) == (4, 2)
    for bad, message in ((dict(n_layer=4), "n_layer"), (dict(n_layers=5), "n_layers=5")):
        with pytest.raises(UserError, match=message):
            create_lsh_v2_model(512, "1M", **bad)


def test_loss_is_shifted_cross_entropy_of_the_logits() -> None:
    model, x = small().eval(), ids()
    labels = x.clone()
    labels[:, ::3] = -100
    out = model(x, labels=labels)
    assert out.logits.shape == (2, 100, 61)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(out.loss - expected) < 1e-6
    assert out.cross_entropy[0, 0] == 0
    assert abs(out.cross_entropy.sum() / (labels[:, 1:] != -100).sum() - expected) < 1e-5


@pytest.mark.parametrize("attention", ["lsh", "dense", "window"])
@pytest.mark.parametrize(
    "changes", [dict(hashing="codebooks"), dict(hashing="cross_polytope"), {}, dict(short_conv=3)], ids=str
)
@torch.no_grad()
def test_logits_depend_on_the_past_only(attention: str, changes: dict[str, Any]) -> None:
    model, x = small(attention=attention, **changes).eval(), ids()
    other = x.clone()
    other[:, 60:] = ids(seed=1)[:, 60:]
    whole, changed, cut = model(x).logits, model(other).logits, model(x[:, :60]).logits
    assert (whole[:, :60] - changed[:, :60]).abs().max() < 1e-5
    assert (whole[:, :60] - cut).abs().max() < 1e-5
    assert (whole[:, 60:] - changed[:, 60:]).abs().amax(-1).min() > 1e-3, "the change itself must be seen"


@torch.no_grad()
def test_logits_that_grow_with_the_logarithm_of_the_keys_are_scalable_softmax() -> None:
    """n^(s z) over their sum, n the keys that a query sees: the definition, pair by pair."""
    model = small(attention="dense", softmax_scale="log_length", rotary_heads=0.0).eval()
    attention, config = model.blocks[0].attention, model.config
    attention.log_temperature.fill_(0.3)
    x = torch.randn(1, 12, config.d_model, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.project(x)
    s, expected = math.exp(0.3) / math.log(1024), torch.zeros_like(q)
    for h in range(config.n_heads):
        group = h * config.n_kv_heads // config.n_heads
        for t in range(12):
            powers = torch.stack([(t + 1.0) ** (s * q[0, h, t] @ k[0, group, j] / math.sqrt(config.head_dim))
                                  for j in range(t + 1)])
            expected[0, h, t] = powers / powers.sum() @ v[0, group, : t + 1]
    got = attention(x, *rotary_angles(12, config, x.device))
    assert (got - attention.out(expected.transpose(1, 2).flatten(2))).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["lsh", "window"])
def test_only_dense_attention_is_scaled_by_the_length(attention: str) -> None:
    with pytest.raises(ValueError, match=f"for attention=dense: with {attention} a query sees the same number of keys"):
        ModelConfig(attention=attention, softmax_scale="log_length")  # type: ignore[arg-type]


def test_a_window_over_everything_is_dense_attention() -> None:
    x = ids()
    lsh, dense = small(window=256), small(window=256, attention="dense")
    dense.load_state_dict(lsh.state_dict(), strict=False)
    results = []
    for model in (lsh, dense):
        loss = model(x, labels=x).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_gradient_checkpointing_changes_nothing() -> None:
    x, results = ids(), []
    for checkpoint in (False, True, "block", "feed_forward"):
        model = small()
        model.gradient_checkpoint = checkpoint  # type: ignore[assignment]
        loss = model(x, labels=x).loss
        loss.backward()
        model.update_hash()
        tables = [t for b in model.blocks for t in b.attention.tables]
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *tables])
    for a, *others in zip(*results, strict=True):
        assert all((a - b).abs().max() < 1e-6 for b in others)


def test_the_more_is_computed_again_the_less_is_kept() -> None:
    x, kept = ids(), []
    for checkpoint in ("block", True, "feed_forward", False):
        model, sizes = small().train(), {}
        model.gradient_checkpoint = checkpoint  # type: ignore[assignment]

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x, labels=x)
        kept.append(sum(sizes.values()))
    assert all(less < 0.9 * more for less, more in zip(kept, kept[1:], strict=False)), kept


@pytest.mark.parametrize("checkpoint", [False, True, "feed_forward"])
def test_what_is_computed_again_does_not_look_for_buckets_again(checkpoint: bool | str) -> None:
    model, x, found = small(hashing="inverted_file").train(), ids(), []
    model.gradient_checkpoint = checkpoint  # type: ignore[assignment]
    for block in model.blocks:
        find = block.attention.find  # type: ignore[union-attr]
        block.attention.find = lambda *plain, find=find: found.append(1) or find(*plain)  # type: ignore[union-attr]
    model(x, labels=x).loss.backward()
    assert len(found) == model.config.n_layers
    assert all(block.attention.key_count == model.config.n_ponder_steps for block in model.blocks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("hashing", ["inverted_file", "codebooks"])
@pytest.mark.parametrize("checkpoint", [False, True, "block", "feed_forward"])
def test_compiled_blocks_train_alike_in_three_graphs(checkpoint: bool | str, hashing: str, backend: str) -> None:
    """Three steps with their hash updates; the graphs of the first block serve all, and no step compiles again."""
    if backend == "torch":
        pytest.skip("the tiles read counts on the host: they are not compiled, and a GPU does not take them")
    x, results = ids(), []
    for compiled in (False, True):
        model = small(hashing=hashing).train()
        model.gradient_checkpoint = checkpoint  # type: ignore[assignment]
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            model.compile_blocks("aot_eager")
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []  # Adam makes much of rounding
        for _ in range(3):
            loss = model(x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_hash()
            losses.append(loss.detach())
        results.append([*losses, *(t for b in model.blocks for t in b.attention.tables), *model.parameters()])
    assert len(model.blocks) > 1 and counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_tied_blocks_are_one_set_of_weights_applied_again() -> None:
    model = small(use_ponder=False)
    assert len(model.blocks) == 2 and model.config.n_ponder_steps == 2
    with torch.no_grad():
        once, twice = (small(use_ponder=False, n_layers=n) for n in (2, 4))
        twice.load_state_dict(once.state_dict())
        assert (once(ids()).logits - twice(ids()).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_short_convolution_mixes_earlier_tokens_into_what_attention_reads() -> None:
    """Against a loop over tokens: y_t = x_t + Σ c_i x_{t−i} makes q and v, y_t + μ y_{t−1} makes k."""
    attention = small(short_conv=3).blocks[0].attention.double().eval()
    x = torch.randn(1, 9, attention.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention.shift.uniform_(generator=torch.Generator().manual_seed(1))
    y = x.clone()
    for t in range(9):
        for i in range(1, min(3, t) + 1):
            y[:, t] += attention.taps[i - 1] * x[:, t - i]
    keys = y.clone()
    keys[:, 1:] += attention.shift * y[:, :-1]
    dim = attention.config.head_dim
    expected = (rms_norm(attention.query(y).unflatten(-1, (-1, dim)), (dim,)),
                rms_norm(attention.key(keys).unflatten(-1, (-1, dim)), (dim,)),
                attention.value(y).unflatten(-1, (-1, dim)))
    for got, want in zip(attention.project(x), expected, strict=True):
        assert (got.transpose(1, 2) - want).abs().max() < 1e-12
    assert attention.taps.std() > 0.1, "taps that begin at nothing learn late"


def test_building_and_running_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = small(seed=3), small(seed=3), small(seed=4)
    a(ids(), labels=ids()).loss.backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


def test_too_long_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seq_len=256"):
        small()(ids(1, 257))
