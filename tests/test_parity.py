"""The parity task: what is drawn and measured is right, and pondering solves at reduced size what one step does not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from lshv2 import parity
from lshv2.parity import Experiment, draw, loss_of, measure, train
from lshv2.parity_networks import SHARPNESS, Answers, PonderGRU, PonderReader
from lshv2.parity_report import by_task, table
from lshv2.parity_report import draw as picture
from lshv2.ponder import halting_log_probs


def test_vectors_have_as_many_elements_as_asked_and_the_parity_of_their_ones() -> None:
    x, odd = draw(2000, 3, 5, 8, torch.Generator().manual_seed(0))
    nonzero = (x != 0).sum(-1)
    assert set(nonzero.tolist()) == {3, 4, 5} and set(x.unique().tolist()) == {-1, 0, 1}
    assert odd.tolist() == [sum(1 for value in row if value == 1) % 2 for row in x.tolist()]
    assert (x != 0).float().mean(0).sub(0.5).abs().max() < 0.06, "places are not drawn evenly"


def test_what_is_trained_and_what_is_tested_do_not_meet() -> None:
    assert (Experiment().trained, Experiment().tested) == ((1, 96), (1, 96))
    other = Experiment(task="extrapolation")
    assert (other.trained, other.tested) == ((1, 48), (49, 96))


class _Given(PonderGRU):
    """Halts with p = .2, .4, .4; only the second answer is right."""

    def forward(self, x: torch.Tensor, steps: int | None = None) -> Answers:
        odd = ((x == 1).sum(-1) % 2).float() * 2 - 1
        halts = torch.tensor([0.2, 0.5, 0.5]).logit()[:, None, None].expand(3, 1, len(x))
        return Answers(torch.stack([-odd, odd, -odd])[:, None], halting_log_probs(halts))


def test_accuracy_and_steps_are_the_expectations_under_p() -> None:
    rows = measure(_Given(4, 2, 3, 0, 0.2, 0), 2, 3, 4, 50, torch.Generator().manual_seed(0))
    assert [row["nonzero"] for row in rows] == [2, 3]
    for row in rows:
        assert row["accuracy"] == pytest.approx(0.4, abs=1e-6) and row["steps"] == pytest.approx(2.2, abs=1e-6)
        assert (row["threshold_accuracy"], row["threshold_steps"]) == (1.0, 2.0)


def test_the_loss_is_the_expected_one_of_the_paper() -> None:
    model = PonderGRU(4, 3, 3, 0, 0.2, 0)
    x, odd = draw(5, 1, 4, 4, torch.Generator().manual_seed(0))
    answers, state, terms = model(x), torch.zeros(5, 3), []
    for n in range(3):
        _, state = model.cell(x[None], state[None])  # one step by hand
        state = state[0]
        right = torch.where(odd > 0, model.heads(state)[:, 0], -model.heads(state)[:, 0]).sigmoid()
        terms.append(answers.log_p[n, 0].exp() * -right.log())
    assert torch.allclose(loss_of(model, x, odd, 0.2, 0.0), sum(terms).mean(), atol=1e-6)


def test_units_stay_wired_to_their_neighbourhood() -> None:
    model = PonderGRU(12, 6, 2, 3, 0.2, 0)
    seen = []
    for element in range(12):
        x = torch.zeros(2, 12)
        x[1, element] = 1
        first = model.cell(x[None])[0][0]
        seen.append([unit for unit in range(6) if (first[0, unit] - first[1, unit]).abs() > 1e-6])
    assert seen == [[0, 5], [0], [0, 1], [1], [1, 2], [2], [2, 3], [3], [3, 4], [4], [4, 5], [5]]


def read_in(model: PonderReader, x: torch.Tensor, steps: int) -> list[list[int]]:
    """Which elements of one vector each step reads, by what its input to the cell is the sum of."""
    asked: list[torch.Tensor] = []
    model.cell.register_forward_pre_hook(lambda _, given: asked.append(given[0].detach()[0]))
    embedded = torch.eye(model.values.weight.shape[1])[: x.shape[1]]
    model.values.weight.data.zero_()  # an element is told by its place alone
    model.values.forward = lambda _: embedded[None]  # type: ignore[method-assign]
    model(x, steps)
    return [given[: x.shape[1]].round().nonzero().flatten().tolist() for given in asked]


def test_a_reader_reads_each_element_once_the_best_first_and_then_nothing() -> None:
    model = PonderReader(8, 4, 4, 3, 0.2, 0)
    with torch.no_grad():
        model.key.weight.copy_(torch.eye(32))
        model.query.zero_()[31] = 1.0
        model.places.zero_()
        model.places[:, 30] = 1.0  # the cosine with the query then follows what stands beside it
        model.places[:, 31] = torch.tensor([3.0, 7, 0.1, 1, 0, 6, 0.5, 2])
        read = read_in(model, torch.ones(1, 8), 4)
    assert read == [[0, 1, 5], [3, 6, 7], [2, 4], []], read


def test_the_gradient_is_that_of_a_softmax_over_all_that_was_not_read() -> None:
    """Straight through: forward the best alone, backward M times the softmax, at the point that was read."""
    model = PonderReader(6, 4, 1, 2, 0.2, 0).double()
    x, read = torch.tensor([[1.0, -1, 0, 0, 1, -1]]), []
    model.cell.register_forward_pre_hook(lambda _, given: read.append(given[0]) or given[0].retain_grad())
    model(x.double()).odd.sum().backward()
    elements = model.values((x + 1).long())[0].detach()
    keys = normalize(model.key(elements + model.places), dim=-1)
    soft = 2 * (SHARPNESS * keys @ normalize(model.query, dim=-1)).softmax(-1)
    worth = soft @ (elements @ read[0].grad[0])  # what the loss gains by more of each element
    want, = torch.autograd.grad(worth, model.places)
    assert model.places.grad is not None and torch.allclose(model.places.grad, want, atol=1e-12)
    assert (want.abs().sum(1) > 0).all(), "what was not read is moved too"


def test_a_reader_answers_for_more_elements_than_it_was_trained_on() -> None:
    """24 elements, trained on one to twelve of them (15 s): four a step, so that more elements take more steps."""
    what = Experiment(task="extrapolation", size=24, hidden=48, max_steps=7, look=4, learning_rate=3e-3, steps=800,
                      mastery=0.9, vary_steps=1)
    result = train(what, lambda _: None)
    rows = {row["nonzero"]: row for row in result["by_nonzero"]}
    assert result["tested"]["accuracy"] > 0.95, result["tested"]
    assert rows[24]["steps"] > rows[12]["steps"] + 0.5 > rows[1]["steps"] + 1.0, [rows[k]["steps"] for k in (1, 12, 24)]
    assert result["curve"][0]["tested"]["accuracy"] < 0.75, "there was nothing to learn"


def test_pondering_solves_what_one_step_does_not() -> None:
    """Six elements at the same width, data and number of gradient steps (10 s). A sign error in the loss fails it."""
    few = Experiment(size=6, hidden=64, learning_rate=1e-2, prior=0.3, steps=1000)
    pondered = train(Experiment(**{**vars(few), "max_steps": 5}), lambda _: None)
    control = train(Experiment(**{**vars(few), "max_steps": 1}), lambda _: None)
    assert pondered["tested"]["accuracy"] > 0.95, pondered["tested"]
    assert control["tested"]["accuracy"] < 0.85 and control["tested"]["steps"] == 1, control["tested"]
    assert pondered["curve"][0]["tested"]["accuracy"] < 0.75, "there was nothing to learn"


def test_more_elements_and_steps_come_as_they_are_learned() -> None:
    """Sixteen elements in fewer gradient steps than suffice where all are there from the start (20 s)."""
    shared = Experiment(size=16, hidden=64, max_steps=8, reach=1, learning_rate=5e-3, steps=1500)
    at_once, by_and_by = (train(replace(shared, mastery=at), lambda _: None) for at in (0.0, 0.9))
    most = [point["most_nonzero"] for point in by_and_by["curve"]]
    assert most[0] <= 3 and most == sorted(most) and most[-1] > 8, most
    assert {point["most_nonzero"] for point in at_once["curve"]} == {16}
    learned = [result["tested"]["accuracy"] for result in (at_once, by_and_by)]
    assert learned[1] > learned[0] + 0.05, learned
    assert [shared.steps_for(k) for k in (2, 16)] == [(8, 8)] * 2
    assert [replace(shared, mastery=0.9).steps_for(k) for k in (2, 5, 15, 16)] == [(2, 2), (3, 3), (8, 8), (8, 8)]
    assert replace(shared, mastery=0.9, vary_steps=1).steps_for(5) == (3, 8)
    half = replace(shared, mastery=0.9, task="extrapolation")
    assert [half.steps_for(k)[0] for k in (4, 8)] == [4, 8], "all that it is trained on, with all steps"


def test_the_number_of_steps_may_vary_and_the_test_may_have_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, forward = [], PonderGRU.forward

    def spy(model: PonderGRU, x: torch.Tensor, steps: int | None = None) -> Answers:
        asked.append((model.training and torch.is_grad_enabled(), steps))
        return forward(model, x, steps)

    monkeypatch.setattr(PonderGRU, "forward", spy)
    result = train(Experiment(size=8, hidden=8, steps=60, max_steps=6, test_steps=9, mastery=2.0, vary_steps=1),
                   lambda _: None)
    assert {steps for learning, steps in asked if learning} == {2, 3, 4, 5, 6}, "up to all of them from the start"
    assert asked[-1] == (False, 9) and len(result["by_nonzero"]) == 8


def test_the_command_writes_its_report_and_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "parity.json", torch.get_rng_state()
    options = ["--task", "extrapolation", "--steps", "60", "--size", "8", "--hidden", "8", "--max-steps", "3"]

    def command(*more: str, to: Path = out) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["parity", "--out", str(to), *options, *more])
        parity.main()
        return json.loads(to.read_text())["runs"]

    first, other = command("--seeds", "0", "1")
    assert [row["nonzero"] for row in first["by_nonzero"]] == list(range(1, 9))
    assert first["settings"]["beta"] == 0.01 and first["environment"]["torch"] and len(first["curve"]) == 60
    tested = [row["accuracy"] for row in first["by_nonzero"] if row["nonzero"] > 4]
    assert first["tested"]["accuracy"] == pytest.approx(sum(tested) / 4, abs=1e-5)
    assert torch.equal(state, torch.get_rng_state())
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    kept, again, reads = command("--seeds", "0", "--look", "0") + command("--seeds", "0", "--look", "2")[2:]
    assert kept["settings"] == other["settings"], "a run made again takes the place of its own"
    assert again["by_nonzero"] == first["by_nonzero"] != other["by_nonzero"], "the seed decides the result, all of it"
    assert reads["settings"]["look"] == 2
    for wrong, said in ((["--look", "9"], "more than the 8"), (["--look", "2", "--reach", "1"], "not with --look")):
        with pytest.raises(SystemExit):
            command(*wrong)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(to=tmp_path / "parity.png")
    out.write_text('{"schema": 1, "tested": {}}')
    with pytest.raises(SystemExit):
        command()
    assert out.read_text() == '{"schema": 1, "tested": {}}' and "delete it" in capsys.readouterr().err


def test_seeds_of_one_network_stand_in_one_line() -> None:
    def run(seed: int, look: int, accuracy: float) -> dict[str, Any]:
        settings = {"task": "extrapolation", "size": 4, "look": look, "vary_steps": 0, "seed": seed}
        rows = [{"nonzero": k, "accuracy": accuracy, "steps": k + seed} for k in range(1, 5)]
        return {"settings": settings, "device": "cpu", "tested": {"accuracy": accuracy}, "by_nonzero": rows}

    runs = [run(0, 2, 0.8), run(2, 2, 0.9), run(0, 0, 0.5)]
    assert [len(group) for group in by_task(runs).values()] == [2, 1]
    heading, reads, sees = table(runs)
    assert reads[1:] == ["2", "0.8500 (0.8000 to 0.9000)", "1: 2.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0"], reads
    longer = {**run(1, 2, 0.99999), "settings": {**runs[0]["settings"], "steps": 9}}
    assert [line[1:3] for line in table([*runs, longer])[3:]] == [["1", "0.9999"]], "apart, and not rounded up"
    assert sees[0] == "extrapolation, 4 elements; sees all elements; cpu" and sees[2] == "0.5000"
    assert len(heading) == len(reads) and len(picture(runs).axes) == 4
