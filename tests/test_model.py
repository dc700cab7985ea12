"""The model: sizes, losses, causality, ponder halting, codebooks, and no global randomness."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, rms_norm

from lshv2.config import ModelConfig, parse_size
from lshv2.errors import UserError
from lshv2.layers import rotary_angles
from lshv2.model import LSHModel, create_lsh_v2_model
from lshv2.ponder import halting_log_probs, ponder_loss
from lshv2.sizes import count_parameters, shape_for

SMALL: dict[str, Any] = dict(
    vocab_size=61, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256, bucket_size=8,
    weight_tied_layers=2, d_ff=48, n_rounds=2, window=8, n_global=2, n_buckets=8,
)


@pytest.fixture(params=["masked", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here twice: these short inputs would else never meet the backend that long ones get."""
    monkeypatch.setattr("lshv2.attention.MASKED_UP_TO", {"masked": 10**9, "torch": 0}[request.param])
    return request.param


def ids(batch: int = 2, length: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0, **changes: Any) -> LSHModel:
    return LSHModel(ModelConfig(**{**SMALL, **changes}), seed=seed)


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
def test_halting_takes_the_first_step_whose_cumulative_probability_reaches_the_threshold() -> None:
    model, x = small(n_layers=8).eval(), ids()
    for bias, expected in ((20.0, 1), (-20.0, 4)):
        model.halt.bias.fill_(bias)
        assert (model(x).ponder_steps == expected).all()
    model.halt.bias.fill_(-0.4)  # λ = .401: cumulative .401, .641
    assert (model(x).ponder_steps == 2).all()


@torch.no_grad()
def test_a_halted_token_answers_with_the_state_at_which_it_halted() -> None:
    """With every token halting at step one, depth does not matter; a lone token that halts early keeps its answer."""
    model, x = small(n_layers=8).eval(), ids()
    model.halt.bias.fill_(20.0)
    one = LSHModel(model.config.model_copy(update=dict(n_layers=2, use_ponder=True)))
    state = {k: (v[:1] if k == "step_embedding" else v) for k, v in model.state_dict().items()}
    one.load_state_dict(state)
    assert (model(x).logits - one.eval()(x).logits).abs().max() < 1e-6


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_the_ponder_loss_weighs_each_prediction_by_the_halting_of_the_token_that_makes_it(share: float) -> None:
    """Token by token in Python's floats: what is predicted at t answers to the halting probabilities of t alone, and
    the last step for what is not pondered yet."""
    model, x = small(n_layers=6).double(), ids(2, 12)
    model.ponder_share = share
    with torch.no_grad():
        model.halt.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(0))
        labels = x.clone()
        labels[:, ::3] = -100
        got = model(x, labels=labels).loss.item()
        state, steps = model.embedding(x), []
        for n in range(3):
            state = model.step_of_all(state, n, rotary_angles(12, model.config, x.device))
            steps.append((model.halt(model.norm(state)).squeeze(-1).sigmoid(), model.head(model.norm(state))))
    prior = [0.3 / (1 - 0.7**3) * 0.7**n for n in range(3)]
    terms = []
    for b, t in [(b, t) for b in range(2) for t in range(11) if labels[b, t + 1] != -100]:
        halts = [steps[n][0][b, t].item() for n in range(2)]
        p = [halts[0], (1 - halts[0]) * halts[1], (1 - halts[0]) * (1 - halts[1])]
        nats = [-steps[n][1][b, t].log_softmax(-1)[labels[b, t + 1]].item() for n in range(3)]
        answers = sum(p[n] * nats[n] for n in range(3)) * share + (1 - share) * nats[2]
        terms.append(answers + model.config.ponder_beta * sum(p[n] * math.log(p[n] / prior[n]) for n in range(3)))
    assert abs(got - sum(terms) / len(terms)) < 1e-6, "cross entropy is summed in float32"


def test_the_ponder_loss_s_gradients_are_those_of_all_logits_at_once() -> None:
    """The model weighs each exit's losses where its logits are; here they are all there, and weighed at the end."""
    model, x = small(n_layers=6).double(), ids(2, 12)
    torch.nn.init.normal_(model.halt.weight, 0.0, 0.4, generator=torch.Generator().manual_seed(0))
    labels = x.clone()
    labels[:, ::3] = -100
    state, halts, nats = model.embedding(x), [], []
    for n in range(3):
        state = model.step_of_all(state, n, rotary_angles(12, model.config, x.device))
        halts.append(model.halt(model.norm(state)).squeeze(-1))
        logits = model.head(model.norm(state))[:, :-1].flatten(0, 1)
        nats.append(cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(2, 11))
    log_p = halting_log_probs(torch.stack(halts))[..., :-1]
    plain = ponder_loss(torch.stack(nats), log_p, labels[:, 1:] != -100, prior=0.3, beta=model.config.ponder_beta)
    ours, theirs = (
        torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        for loss in (model(x, labels=labels).loss, plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a is b or (a - b).abs().max() < 1e-6, "the halting distribution is in float32"


def test_while_only_the_last_step_is_trained_it_answers() -> None:
    model, x = small().eval(), ids()
    torch.nn.init.constant_(model.halt.bias, 4.0)  # else all tokens halt at the first
    assert (model(x).ponder_steps == 1).all()
    model.ponder_share = 0.0
    assert (model(x).ponder_steps == model.config.n_ponder_steps).all()
    model.ponder_share = 0.01
    assert (model(x).ponder_steps == 1).all()


def test_the_ponder_gradient_reaches_the_halting_head() -> None:
    model, x = small(), ids()
    model(x, labels=x).loss.backward()
    assert model.halt.weight.grad.abs().max() > 0 and model.step_embedding.grad.abs().max() > 0


def test_codebooks_move_while_training_only() -> None:
    model, x = small(), ids()
    before = [t.clone() for t in model.blocks[0].attention.tables]
    model.eval()(x)
    model.update_hash()
    assert all(torch.equal(a, b) for a, b in zip(before, model.blocks[0].attention.tables, strict=True))
    model.train()(x)
    model.update_hash()
    assert not torch.equal(before[0], model.blocks[0].attention.tables[0])
    fixed = small(hashing="cross_polytope").train()
    before = [t.clone() for t in fixed.blocks[0].attention.tables]
    fixed(x)
    fixed.update_hash()
    assert torch.equal(before[0], fixed.blocks[0].attention.tables[0])


def test_an_inverted_file_follows_the_keys_alone() -> None:
    """Centroids and mean move with the keys, whatever the queries are; without training nothing moves."""
    model, x = small(hashing="inverted_file", n_layers=2), ids()  # each block is applied once
    attention = model.blocks[0].attention
    states = []
    for queries in (1.0, -1.0):
        other = small(hashing="inverted_file").train()
        with torch.no_grad():
            other.blocks[0].attention.query.weight.mul_(queries)
            other.blocks[0](other.embedding(x), *rotary_angles(x.shape[1], other.config, x.device))
        other.update_hash()
        states.append([other.blocks[0].attention.table0.clone(), other.blocks[0].attention.key_mean.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert states[0][1].any() and not torch.equal(states[0][0], attention.table0)
    model.eval()(x)
    model.update_hash()
    assert not attention.key_mean.any()
    model.train()
    for _ in range(300):
        model(x)
        model.update_hash()
    k = attention.project(model.blocks[0].attention_norm(model.embedding(x)))[1]
    assert torch.allclose(attention.key_mean[:, 0], k.float().mean((0, 2)), atol=1e-4)


def test_an_inverted_file_places_keys_by_what_sets_them_apart() -> None:
    """What all keys have in common moves none of them to another cell once the mean is known; before, it does."""
    attention = small(hashing="inverted_file").blocks[0].attention.eval()
    generator = torch.Generator().manual_seed(0)
    k, common = torch.randn(1, 2, 200, 8, generator=generator), 5 * torch.randn(2, 1, 8, generator=generator)
    q = torch.randn(1, 4, 200, 8, generator=generator)
    want = attention.hash(q, k)[1]
    assert (attention.hash(q, k + common)[1] == want).float().mean() < 0.5
    attention.key_mean.copy_(common)
    assert (attention.hash(q, k + common)[1] == want).float().mean() > 0.99


@torch.no_grad()
def test_queries_weigh_a_cells_length_and_keys_its_direction() -> None:
    """A cell of long keys is looked into before one of short keys that points as well; keys lie where they lay."""
    attention = small(hashing="inverted_file", centroids="mean", n_rounds=1).blocks[0].attention.eval()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 500, 8, generator=generator) for heads in (4, 2))
    cells, places = attention.hash(q, k)
    attention.table0[:, :, 3] *= 4
    longer, same = attention.hash(q, k)
    assert torch.equal(places, same) and (longer == 3).float().mean() > 2 * (cells == 3).float().mean()
    assert (longer == 3)[cells == 3].float().mean() > 0.95, "who looked there still does, unless all cells are behind"


@torch.no_grad()
def test_mean_centroids_become_the_means_of_their_cells_keys() -> None:
    model, x = small(hashing="inverted_file", centroids="mean", n_layers=2, codebook_decay=0.5), ids()
    attention = model.blocks[0].attention
    model.train()
    for _ in range(100):  # the weights stay: cells and mean settle
        model(x)
        model.update_hash()
    k = attention.project(model.blocks[0].attention_norm(model.embedding(x)))[1] - attention.key_mean
    places = attention.hash(*attention.project(model.blocks[0].attention_norm(model.embedding(x)))[:2])[1]
    model.update_hash()
    full = 0
    for head in range(k.shape[1]):
        for cell in range(attention.table0.shape[2]):
            caught = k[:, head][places[:, head, 0] == cell]
            if len(caught):
                full += 1
                assert torch.allclose(attention.table0[head, 0, cell], caught.mean(0), atol=1e-3)
    assert full > 4 and not attention.caught.any(), "noted once, spent once"


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
