"""The arena's lines as reader, pictures and README take them: seeds averaged, later lines count, nothing is fatal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from example_arena import arena_rows, write_arena

from lshv2 import readme
from lshv2.arena_digest import digest_table, told
from lshv2.arena_gain import gain_table
from lshv2.arena_plots import draw_arena, draw_curve, draw_needles, write_pictures
from lshv2.arena_results import FILE, Arena, find_arenas, read_arena, summarise
from lshv2.arena_views import (
    cost_table,
    group_labels,
    grouped,
    levels,
    lines,
    quality_lengths,
    quality_lines,
    quality_twins,
    score_table,
    shown_score,
    spread,
)
from lshv2.errors import UserError
from lshv2.runs import append_jsonl, write_json

ROW = {"task": "mqar", "model": "lsh", "seed": 0, "setting": "", "seq_len": 1024, "status": "ok", "trained_len": 512,
       "metric": "accuracy", "value": 0.5, "chance": 0.25}


def arena(folder: Path, *rows: dict[str, Any]) -> Arena:
    content, problems = read_arena(write_arena(folder, list(rows)))
    assert content is not None and not problems, problems
    return content


def test_seeds_are_averaged_with_their_spread(tmp_path: Path) -> None:
    by = ({"0.111": 0.2, "0.0": 0.4}, {"0.0": 0.8})
    rows = [{**ROW, "seed": n, "value": value, "by": {"depth": depths}, "shortcuts": {"a": 0.1 * n, "b": 0.3}}
            for n, (value, depths) in enumerate(zip((0.5, 0.8), by, strict=True))]
    (s,) = arena(tmp_path, *rows).summaries
    assert (s.seeds, s.mean, s.low, s.high, s.chance) == (2, pytest.approx(0.65), 0.5, 0.8, 0.25)
    assert list(s.by["depth"].items()) == [("0.0", pytest.approx(0.6)), ("0.111", 0.2)], "in the order of the numbers"
    assert s.shortcut == ("b", 0.3) and spread(s) == "65.0 % (50.0 to 80.0 %)"


def test_labels_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    labels = ["late", "10", "9", "4096-8191", "0.5", "16384-32767"]
    (s,) = arena(tmp_path, {**ROW, "by": {"gap": dict.fromkeys(labels, 0.5)}}).summaries
    assert list(s.by["gap"]) == ["0.5", "9", "10", "4096-8191", "16384-32767", "late"]


def test_a_later_line_replaces_the_earlier(tmp_path: Path) -> None:
    nowhere = {**ROW, "trained_len": None}
    kept = arena(tmp_path, ROW, {**ROW, "value": 0.9}, {**ROW, "value": 0.1, "trained_len": 1024},
                 {**ROW, "value": 0.2, "setting": "rounds=1"}, nowhere, nowhere)
    assert len(kept.rows) == 4
    assert {(s.trained_len, s.setting): s.mean for s in kept.summaries if s.trained_len > 0} == {
        (512, ""): 0.9, (512, "rounds=1"): 0.2, (1024, ""): 0.1}
    assert list(lines(kept.of("mqar"))) == ["LSH", "LSH, trained at 512", "LSH, trained at 1,024"]


def test_models_of_a_former_recipe_are_not_averaged_with_the_present_ones(tmp_path: Path) -> None:
    former = [{**ROW, "seed": seed, "value": 0.2, "trained_by": "old"} for seed in range(3)]
    elsewhere = {**ROW, "model": "dense", "trained_by": "old"}
    rows = [*former, elsewhere, {**ROW, "value": 1.0, "seed": 1, "seq_len": 2048, "trained_by": "new"}]
    content, problems = read_arena(write_arena(tmp_path, rows))
    assert content is not None and {(s.model, s.seq_len, s.seeds, s.mean) for s in content.summaries} == {
        ("dense", 1024, 1, 0.5), ("lsh", 2048, 1, 1.0)}
    assert [str(p) for p in problems] == [
        f"{FILE} 3 lines are of models that have since been trained otherwise: left out"]


def test_the_summary_is_strict_json_and_says_what_has_no_value() -> None:
    rows = [ROW, {**ROW, "model": "dense", "status": "out of memory", "value": None, "chance": None}]
    want = {"task": "mqar", "model": "lsh", "setting": "", "trained_len": 512, "seq_len": 1024, "metric": "accuracy",
            "seeds": 1, "mean": 0.5, "low": 0.5, "high": 0.5, "chance": 0.25}
    assert summarise(rows) == [want, {**want, "model": "dense", "seeds": 0, **dict.fromkeys(
        ("mean", "low", "high", "chance"))}]
    json.dumps(summarise(arena_rows()), allow_nan=False)
    assert summarise([]) == []


def test_a_value_of_a_row_that_is_not_ok_does_not_count(tmp_path: Path) -> None:
    s = arena(tmp_path, {**ROW, "status": "timeout"}).summaries[0]
    assert s.seeds == 0 and math.isnan(s.mean) and s.status == "timeout"


@pytest.mark.parametrize("line, said", [
    (b'{"task": "mqar"', "line 2 is broken"), (b"[1, 2]", "line 2 is broken"), (b"[" * 100_000, "line 2 is broken"),
    (b'{"task": 7, "model": "lsh", "seq_len": 1}', "1 of 3 lines have no task, model or seq_len"),
    (b'{"task": "mqar", "model": "lsh", "seq_len": "long"}', "1 of 3 lines have no task, model or seq_len"),
    (b'{"task": "mqar", "model": "lsh", "seq_len": 8, "value": "0.5"}', "1 of 3 lines are ok and have no value"),
    (b'{"task": "mqar", "model": "lsh", "seq_len": 8, "value": 99.1}', "1 of 3 lines are ok and have no value"),
    (b'{"task": "mqar", "model": "lsh", "seq_len": 8, "value": NaN}', "1 of 3 lines are ok and have no value"),
])
def test_a_bad_line_is_one_problem_and_the_rest_is_read(tmp_path: Path, line: bytes, said: str) -> None:
    good = json.dumps(ROW).encode()
    (tmp_path / FILE).write_bytes(good + b"\n" + line + b"\n" + good.replace(b"1024", b"2048") + b"\n")
    content, problems = read_arena(tmp_path)
    assert content is not None and [s.seq_len for s in content.summaries if s.seeds] == [1024, 2048]
    assert len(problems) == 1 and str(problems[0]).startswith(f"{FILE} ") and said in str(problems[0])


def test_wrong_types_and_unknown_keys_are_left_out(tmp_path: Path) -> None:
    odd = {**ROW, "by": {"depth": [1, 2], "hops": {"1": "x", "2": 0.5}, "gap": None}, "shortcuts": 7, "chance": "low",
           "seed": None, "unknown": {"a": [1]}, "trained_len": "far", "milliseconds": True, "rounds": 4, "device": 9}
    (row,) = arena(tmp_path, odd).rows
    assert row.by == {"hops": {"2": 0.5}} and row.shortcuts == {} and math.isnan(row.chance)
    assert row.seed == 0 and math.isnan(row.trained_len) and row.values["rounds"] == 4 and row.origin["device"] == "9"


def test_a_torn_last_line_is_no_problem_and_no_line_is_one(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(ROW) + '\n{"task": "mq')
    content, problems = read_arena(tmp_path)
    assert content is not None and not problems
    append_jsonl(tmp_path / FILE, {**ROW, "seed": 1})
    assert len(read_arena(tmp_path)[0].rows) == 2, "what is appended after a kill is read"
    (tmp_path / FILE).write_bytes(b"")
    content, problems = read_arena(tmp_path)
    assert content is None and str(problems[0]) == "arena.jsonl has no lines"
    assert read_arena(tmp_path / "nowhere")[1][0].missing
    with pytest.raises(UserError, match="no plot: arena.jsonl has no lines"):
        write_pictures(tmp_path)


def test_levels_take_the_strongest_shortcut_in_the_metrics_own_direction(tmp_path: Path) -> None:
    right = arena(tmp_path / "a", {**ROW, "shortcuts": {"weak": 0.1}},
                  {**ROW, "model": "window", "shortcuts": {"strong": 0.4}})
    assert [(level.name, level.shortcut, level.chance) for level in levels(right.of("mqar"))] == [("strong", 0.4, 0.25)]
    bits = arena(tmp_path / "b", {**ROW, "metric": "bits_per_byte", "value": 1.5, "shortcuts": {"a": 2.3, "b": 5.0}})
    lower = arena(tmp_path / "c", *({**ROW, "metric": "bits_per_byte", "model": model, "shortcuts": {name: value}}
                                    for model, name, value in (("lsh", "low", 1.9), ("dense", "high", 2.3))))
    assert levels(lower.of("mqar"))[0].name == "low", "the best of all models' examples"
    assert levels(bits.of("mqar"))[0].name == "a" and shown_score(1.5, "bits_per_byte") == "1.500"


def test_nothing_below_100_percent_is_shown_as_it() -> None:
    shown = [shown_score(value, "accuracy") for value in (1, 0.99999, 0.9996, 0.9994, 0.9912, 0.000244, 0, math.nan)]
    assert shown == ["100 %", "99.99 %", "99.96 %", "99.94 %", "99.12 %", "0.024 %", "0 %", ""]


def test_the_quality_curve_joins_shapes_that_were_trained_and_differ_in_one_thing(tmp_path: Path) -> None:
    def row(setting: str, rounds: int, keys: int, cells: int) -> dict[str, Any]:
        return {**ROW, "setting": setting, "rounds": rounds, "keys_a_query": keys, "n_buckets": cells}

    asked = [row("", 4, 324, 16), row("rounds=1", 1, 132, 16)]
    swept = [row("R 4, W 64, cells x 1", 4, 324, 16), row("R 4, W 16, cells x 1", 4, 132, 16),
             row("R 4, W 64, cells x 4", 4, 324, 64), row("R 1, W 64, cells x 1", 1, 132, 16)]
    found = {name: [s.get("keys_a_query") for s in line]
             for name, line in quality_lines(arena(tmp_path / "a", *asked, *swept).of("mqar", None)).items()}
    assert found == {"LSH, rounds 1": [132], "LSH, rounds 4": [132, 324], "LSH, rounds 4, 64 cells": [324]}
    only_asked = quality_lines(arena(tmp_path / "b", *asked).of("mqar", None))
    assert list(only_asked) == ["LSH, rounds 1", "LSH, rounds 4"]


def test_the_quality_curve_is_compared_with_the_twins_of_its_own_training(tmp_path: Path) -> None:
    rows = [{**ROW, "model": "window", "value": 0.1}, {**ROW, "model": "dense", "value": 0.9}]
    swept = {**ROW, "model": "window", "value": 0.3, "setting": "window 64"}
    lighter = {**ROW, "model": "dense", "value": 0.8, "setting": "half of the training"}
    for folder, more, dense, window in (("a", [], 0.9, 0.1), ("b", [swept], 0.9, 0.3),
                                        ("c", [swept, lighter], 0.8, 0.3)):
        twins = quality_twins(arena(tmp_path / folder, *rows, *more).of("mqar", None))
        assert {s.model: s.mean for line in twins.values() for s in line} == {"dense": dense, "window": window}
    curve = {**ROW, "setting": "R 4, W 64, cells x 1", "rounds": 4, "keys_a_query": 324}
    others = ({"steps": 7, "model": "dense_scaled"}, {"setting": "sequences 1", "model": "dense"})
    twins = quality_twins(arena(tmp_path / "d", curve, *rows, *({**ROW, **o} for o in others)).of("mqar", None))
    assert {s.model: s.mean for line in twins.values() for s in line} == {"dense": 0.9, "window": 0.1}


def test_a_shortcut_far_above_the_models_bits_is_said_and_does_not_press_them_flat(tmp_path: Path) -> None:
    text = {**ROW, "task": "bytes", "metric": "bits_per_byte", "shortcuts": {"two bytes": 3.0}}
    drawn = arena(tmp_path, *({**text, "model": model, "seq_len": n, "value": value + n / 1e5}
                              for model, value in (("lsh", 1.1), ("dense", 1.2)) for n in (1024, 4096)))
    axis = draw_arena(drawn).axes[0]
    assert axis.get_ylim()[1] < 1.3 and "two bytes: 3.000" in axis.get_legend_handles_labels()[1]
    better = arena(tmp_path / "b", {**text, "value": 1.1, "shortcuts": {"two bytes": 0.5}})
    assert draw_arena(better).axes[0].get_ylim()[0] < 0.5, "a rule that beats the models has to be seen"


def test_the_pictures_show_every_task_group_and_sweep(tmp_path: Path) -> None:
    drawn = arena(tmp_path, *arena_rows())
    assert quality_lengths(drawn.of("mqar", None)) == [1024] and quality_lengths(drawn.of("passkey", None)) == []
    titles = [axis.get_title(loc="left") for axis in draw_arena(drawn).axes]
    assert titles == [
        "MQAR, 64 pairs, trained at 2k (dashed)", "duplication, trained at 1k (dashed)",
        "induction heads, trained at 256 (dashed)", "passkey, trained at 2k (dashed)",
        "variable tracking, trained at 2k (dashed)", "bytes of real text, trained at 4k (dashed)",
        "my_own_task, trained at 2k (dashed)", "variable tracking at 131,072 tokens",
        "bytes of real text at 131,072 tokens"]
    curve = draw_curve(drawn)
    assert curve and [axis.get_title(loc="left") for axis in curve.axes] == [
        "MQAR, 64 pairs at 1,024 tokens", "duplication at 1,024 tokens", "bytes of real text at 1,024 tokens"]
    assert draw_curve(arena(tmp_path / "no-shapes", ROW)) is None
    shapes = [{**ROW, "setting": f"R {r}", "keys_a_query": r, "rounds": r, "trained_len": 64.0} for r in (1, 2)]
    longer = {**ROW, "model": "window", "trained_len": 128.0}
    assert draw_curve(arena(tmp_path / "two-trainings", *shapes, longer)) is None, "no shapes of the longest"
    whole = draw_arena(drawn)
    assert [entry.get_text() for entry in whole.legends[0].get_texts()] == [
        "LSH", "dense", "dense, scaled by log n", "window only", "chance"]
    first = whole.axes[0]
    assert [entry.get_text() for entry in first.get_legend().get_texts()] == ["guess a value shown"]
    named = {line.get_label(): list(line.get_xdata()) for line in first.lines}
    assert named["LSH"] == [1024, 4096, 16_384, 131_072] and named["dense"] == [1024, 4096, 16_384], "out of memory"
    assert {"chance", "guess a value shown", "window only"} <= named.keys() and [2048, 2048] in named.values()
    by_place = next(axis for axis in draw_arena(drawn).axes if axis.get_xlabel().startswith("position"))
    assert [tick.get_text() for tick in by_place.get_xticklabels()] == ["0", "2k", "4k", "8k", "16k", "32k", "64k"]
    needles = draw_needles(drawn)
    assert needles and [axis.get_title(loc="left") for axis in needles.axes] == [
        "passkey, LSH", "passkey, dense", "passkey, window only"]
    assert len(needles.axes[0].texts) == 40 and len(needles.axes[1].texts) == 30, "a number a measured cell"
    key_value = [{**row, "task": "kv_needle"} for row in arena_rows()
                 if (row["task"], row["model"]) == ("passkey", "lsh")]
    both = draw_needles(arena(tmp_path / "both", *arena_rows(), *key_value))
    title = draw_arena(arena(tmp_path / "narrow", ROW)).legends[0].get_title().get_text()
    assert "chance" in title and max(map(len, title.split("\n"))) < 60, "it fits the one panel"
    assert both and [axis.texts[0].get_text() for axis in both.axes[4:]] == [
        "key–value needle, dense: not measured", "key–value needle, window only: not measured"], "a row a task"
    names = ["arena.png", "arena_curve.png", "arena_needles.png"]
    assert [path.name for path in write_pictures(tmp_path)] == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert [path.name for path in write_pictures(write_arena(tmp_path / "one", [ROW]))] == ["arena.png"]
    assert draw_arena(arena(tmp_path / "none", {**ROW, "status": "timeout"})).axes == []


def test_a_task_of_one_length_shows_what_every_rule_reaches(tmp_path: Path) -> None:
    rules = {"the most frequent class": 0.175, "the root alone": 0.365, "the two upper levels": 0.663}
    tree = {**ROW, "task": "listops", "seq_len": 2001, "shortcuts": rules}
    axis = draw_arena(arena(tmp_path, tree)).axes[0]
    told = {line.get_label(): line.get_ydata()[0] for line in axis.lines}  # type: ignore[index]
    assert told["the root alone: 36.5 %"] == 36.5 and told["the two upper levels: 66.3 %"] == 66.3
    assert score_table(arena(tmp_path, tree))[1][-1] == (
        "66.3 % (the two upper levels), 36.5 % (the root alone), 17.5 % (the most frequent class)")


def test_what_longer_contexts_save_is_each_seed_against_itself(tmp_path: Path) -> None:
    def text(model: str, seed: int, length: int, bits: float, **more: Any) -> dict[str, Any]:
        return {**ROW, "task": "bytes", "metric": "bits_per_byte", "model": model, "seed": seed, "seq_len": length,
                "value": bits, "by": {"part": {"the end": bits}}, **more}

    rows = [text("lsh", 0, 4096, 1.20), text("lsh", 0, 16_384, 1.15), text("lsh", 1, 4096, 1.10),
            text("lsh", 1, 16_384, 1.11), text("dense", 0, 4096, 1.3), text("dense", 0, 131_072, 1.5),
            text("window", 0, 1024, 1.3), text("lsh", 2, 4096, 9.0, setting="R 8"),
            text("lsh", 3, 4096, 9.0, by={"position": {"0": 9.0}}), {**ROW, "seq_len": 4096}]
    assert gain_table(arena(tmp_path, *rows)) == [
        ["task", "model", "seeds", "16,384", "131,072"],
        ["bytes of real text", "LSH", "2", "+0.020 (-0.010 to +0.050)", "–"],
        ["bytes of real text", "dense", "1", "–", "-0.200"]]
    shorter = [text("lsh", 0, 4096, 9.0, trained_len=256), text("lsh", 0, 16_384, 8.0, trained_len=256)]
    more = [text("lsh", 0, 131_072, 1.0), *shorter]
    assert gain_table(arena(tmp_path / "d", *rows, *more))[1] == [
        "bytes of real text", "LSH", "1 to 2", "+0.020 (-0.010 to +0.050)", "+0.200"], "of the longest trained length"
    assert gain_table(arena(tmp_path / "b", ROW)) == []
    assert "each seed against itself" in str(readme.arena_part(write_arena(tmp_path / "c", rows), "x"))


def test_groups_keep_their_order_where_a_model_lacks_some(tmp_path: Path) -> None:
    def hops(model: str, labels: str, **more: Any) -> dict[str, Any]:
        return {**ROW, "model": model, "by": {"hops": {label: 0.1 * int(label) for label in labels}}, **more}

    asked = hops("lsh", "2", setting="pondering")
    asked["by"]["ponder_step"] = {"4": 1.0, "3": 0.5}
    gaps = {**ROW, "setting": "rounds=1", "by": {"gap": {"1": 1.0}}}
    drawn = arena(tmp_path, hops("lsh", "13"), hops("dense", "123"), asked, gaps)
    shown = grouped(drawn.of("mqar", None), "hops")
    assert list(shown) == ["LSH", "dense", "LSH, pondering"] and group_labels(shown.values(), "hops") == ["1", "2", "3"]
    assert list(grouped(drawn.of("mqar", None), "ponder_step")) == ["LSH, pondering"]
    assert not grouped(drawn.of("mqar", None), "gap"), "of other settings hops and steps alone"
    by_name = {axis.get_xlabel(): axis for axis in draw_arena(drawn).axes}
    found = {line.get_label(): list(line.get_xdata()) for line in by_name["hops"].lines}
    assert found["LSH"] == [0, 2] and found["dense"] == [0, 1, 2] and found["LSH, pondering"] == [1]
    assert [tick.get_text() for tick in by_name["hops"].get_xticklabels()] == ["1", "2", "3"]
    assert "ponder steps that the answer took" in by_name


def test_lines_that_are_left_out_are_told_in_the_readme(tmp_path: Path) -> None:
    former = {**ROW, "trained_by": "old", "seed": 1}
    write_arena(tmp_path, [former, {**ROW, "trained_by": "new"}])
    said = readme.arena_part(tmp_path, "x", short=True)
    assert said and "**arena.jsonl 1 lines are of models that have since been trained otherwise: left out.**" in said


def test_what_a_sequence_costs_is_a_table_where_it_was_timed(tmp_path: Path) -> None:
    def row(model: str, ms: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
        return {**ROW, "model": model, "seed": seed, "forward_ms": ms, "seq_len": 4096, **more}

    timed = [row("lsh", 2.0, keys_a_query=68, forward_mb=7.5), row("lsh", 4.0, 1, keys_a_query=68, forward_mb=8.5),
             row("dense", 9.0), row("window", None), row("lsh", 1.0, seq_len=1024), row("dense", 99.0, seq_len=8192)]
    timed += [row("dense_scaled", 8.0, setting="sequences 1"), row("window", 5.0, setting="rounds=1"),
              row("lsh", 50.0, setting="sequences 1")]
    made = write_arena(tmp_path, timed)
    content, _ = read_arena(made)
    assert content and cost_table(content)[1:] == [
        ["MQAR, 64 pairs", "4,096", "LSH", "68", "2", "3 (2 to 4)", "8"],
        ["", "", "dense", "all", "1", "9", "not measured"],
        ["", "", "dense, scaled by log n", "all", "1", "8", "not measured"]]
    assert "| MQAR, 64 pairs | 4,096 | LSH | 68 | 2 | 3 (2 to 4) | 8 |" in str(readme.arena_part(made, "x"))
    assert cost_table(arena(tmp_path / "b", ROW)) == [] and "costs" not in str(readme.arena_part(tmp_path / "b", "x"))


def test_a_digest_has_each_task_where_it_was_trained_and_at_its_longest(tmp_path: Path) -> None:
    """Beyond the trained length alone dense attention would look worse than it is."""
    def row(model: str, length: int, value: float | None, **more: Any) -> dict[str, Any]:
        return {**ROW, "model": model, "seq_len": length, "value": value, "trained_len": 2048, "keys_a_query": 68,
                "shortcuts": {"guess": 0.5 if length < 9000 else 0.25}, **more}

    rows = [row(model, length, value, seed=seed) for model, values in (("lsh", (0.9, 0.8, 0.7)), ("dense", (1.0, 0.5)))
            for length, value in zip((1024, 4096, 16_384), values, strict=False) for seed in range(2)]
    rows += [row("window", 16_384, None, status="out of memory", keys_a_query=4), row("lsh", 65_536, None, status="x"),
             {**ROW, "task": "other", "model": "dense"}, row("lsh", 16_384, 0.1, setting="rounds=1"),
             row("dense", 4096, 0.75, trained_len=4096), {**ROW, "task": "third", "value": None, "status": "not run"}]
    content = arena(tmp_path, *rows)
    assert digest_table(content) == [
        ["task", "tokens", "keys a query", "LSH", "dense", "window only", "best shortcut"],
        ["MQAR, 64 pairs, trained at 2,048", "4,096", "68", "80.0 %, 2 seeds", "50.0 %, 2 seeds", "–",
         "50.0 % (guess)"],
        ["", "16,384", "", "70.0 %, 2 seeds", "–", "out of memory", "25.0 % (guess)"],
        ["other, trained at 512", "1,024", "all", "–", "50.0 %, 1 seed", "–", "–"], ["third", *["–"] * 6]]
    assert told(content) == [
        "MQAR, 64 pairs: LSH, trained at 2,048 90.0 %, 80.0 %, 70.0 %, x; dense, trained at 2,048 100 %, 50.0 %, –, –; "
        "dense, trained at 4,096 –, 75.0 %, –, –; window only, trained at 2,048 –, –, out of memory, –; "
        "at 1,024, 4,096, 16,384, 65,536 tokens; chance 25.0 %",
        "other: dense 50.0 %; at 1,024 tokens, trained at 512; chance 25.0 %",
        "third: LSH not run; at 1,024 tokens, trained at 512; chance 25.0 %"]


def test_a_reference_is_a_table_in_the_readme(tmp_path: Path) -> None:
    folder = write_arena(tmp_path / "reference-x" / "arena", arena_rows())
    write_arena(tmp_path / "mine", [ROW])
    assert find_arenas(tmp_path) == [tmp_path / "mine", folder]
    said = readme.results(tmp_path)
    assert said.startswith("**[reference-x/arena](runs/reference-x/arena)**, the arena: cpu (test data)")
    assert said.count("**[") == 1, "a run that is no reference"
    assert "torch 2.13.0, commit 0123456." in said and "| 1,024 | 4,096 | 16,384 | 131,072 | chance |" in said
    lsh, dense = (next(line for line in said.splitlines() if line.startswith(start))
                  for start in ("| MQAR, 64 pairs, trained at 2,048 | LSH | 3 |", "|  | dense | 3 |"))
    assert lsh.endswith("| 96.8 % (96.4 to 97.2 %) | 0.024 % | 0.098 % (guess a value shown) |")
    assert dense.endswith("| out of memory |  |  |")
    assert "| 1.192 (1.188 to 1.196) | 8.000 | 2.310 (order-2 model) |" in said
    target = "| induction heads, trained at 256, at 131,072 | ≥ 95 % | ≥ 100 % |"
    assert f"{target} 96.79 % (3 seeds, the lowest 96.39 %) | met |" in said and "![" not in said
    write_pictures(folder)
    assert "(runs/reference-x/arena/arena.png)" in readme.results(tmp_path)


def test_a_readme_without_a_usable_arena_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "reference-x" / "arena").mkdir(parents=True)
    (tmp_path / "reference-x" / "arena" / FILE).write_text("[1]\n{}\n")
    assert readme.results(tmp_path) == readme.NONE_YET
    write_json(tmp_path / "reference-x" / "arena" / "benchmark_summary.json", {"rows": []})
    assert readme.results(tmp_path) == readme.NONE_YET


def test_where_a_task_was_measured(tmp_path: Path) -> None:
    rows = [{**ROW, "task": task, "device": device, "commit": 40 * device}
            for task, device in (("mqar", "a"), ("passkey", "b"))]
    found = arena(tmp_path, *rows)
    assert found.origins("commit") == ["aaaaaaa", "bbbbbbb"]
    assert (found.origins("device"), found.origins("device", "passkey")) == (["a", "b"], ["b"])
