"""The command line behind the Makefile: `python -m lshv2 quick RUN=first SET="train.learning_rate=3e-4"`.

Exit codes: 0 done, 1 a phase failed, 2 the person can mend it (one line says how), 130 and 143 interrupted.
"""

from __future__ import annotations

import glob
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.presets import PRESETS, make_settings, parse_override, sections
from lshv2.runs import PHASES, check_run_name, hold, load_run, read_json, runs_root
from lshv2.sizes import SHAPE_KEYS

COMMANDS = {
    "quick": PHASES,
    "full": PHASES,
    "test-only": ("01_model", "02_data"),
    "no-training": tuple(name for name in PHASES if name != "03_train"),
    "no-benchmark": tuple(name for name in PHASES if not name.startswith("04_")),
    "arena": ("04_arena",),
    "package": ("05_report",),
}
VARIABLES = ("RUN", "PRESET", "SEED", "NPROC", "DATA", "SET", "FORCE", "YES")
PATHS = ("arena.plugins", "data.source")  # settings that are paths of files
FLAGS = {"": False, "0": False, "1": True}


def main(arguments: list[str]) -> int:
    try:
        command, values = _parse(arguments)
        if command == "clean-run":
            return clean_run(values)
        if command == "sweep":
            return sweep(values)
        return run(command, values)
    except UserError as error:
        print(f"lshv2: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """`quick RUN=x` -> `("quick", {"RUN": "x"})`; an empty value is one that was not given."""
    allowed = [*COMMANDS, "sweep", "clean-run"]
    if not arguments or arguments[0] not in allowed:
        raise UserError(f"unknown command {' '.join(arguments[:1]) or '(none)'}; allowed: {', '.join(allowed)}")
    values = dict.fromkeys(VARIABLES, "")
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        if not equals or name not in VARIABLES:
            raise UserError(f"unknown argument {argument!r}; allowed: {', '.join(f'{v}=' for v in VARIABLES)}")
        values[name] = value
    return arguments[0], values


def run(command: str, values: dict[str, str]) -> int:
    """Run the command's phases with what the variables say; `package` takes the settings that the run was made with."""
    from lshv2.arena.study import training_flops
    from lshv2.estimate import check_arena_time, check_full
    from lshv2.runner import Pipeline

    preset = values["PRESET"] or (command if command in PRESETS else "quick")
    if command in PRESETS and preset != command:
        raise UserError(f"PRESET={preset} contradicts `make {command}`; leave one of them out")
    run_dir = runs_root() / check_run_name(values["RUN"] or preset)
    yes, force = _flag("YES", values), _flag("FORCE", values)
    settings = _own_settings(run_dir, values) if command == "package" else _given_settings(run_dir, preset, values)
    again = _command_line(command, values)

    def check(settings: Settings, due: list[str]) -> None:
        if "04_arena" in due:
            from lshv2.arena.phase import check_arena

            jobs = check_arena(settings)
        if settings.preset == "full" and not yes:
            check_full(settings, due, command=again)
        if "04_arena" in due and not yes:
            small = "" if settings.arena.small else "PRESET=quick"
            check_arena_time(training_flops(jobs), len(jobs), command=again, small=small)

    pipeline = Pipeline(
        run_dir=run_dir, **settings, force=force, chosen=COMMANDS[command], resume=again, before_work=check
    )
    return pipeline.run()


def sweep(values: dict[str, str]) -> int:
    """The quality curve of `lshv2.arena.sweep`, in a run folder of its own."""
    from lshv2.runner.sweep import run_sweep

    preset = values["PRESET"] or "quick"
    if values["FORCE"]:
        raise UserError("a sweep computes what is missing; to begin anew: make clean-run RUN=name")
    run_dir = runs_root() / check_run_name(values["RUN"] or f"sweep-{preset}")
    yes = _flag("YES", values)
    return run_sweep(run_dir, _command_line("sweep", values), yes=yes, **_given_settings(run_dir, preset, values))


def _given_settings(run_dir: Path, preset: str, values: dict[str, str]) -> dict[str, Any]:
    _check_preset(run_dir, preset)
    return {
        "preset": preset,
        "overrides": {
            **{f"{section}.{key}": _absolute(f"{section}.{key}", value)
               for section, key, value in map(parse_override, values["SET"].split())},
            **({"parallel.nproc": _number("NPROC", values, default=1)} if values["NPROC"] else {}),
        },
        "seed": _number("SEED", values, default=0),
        "data": _data(values["DATA"]),
    }


def _absolute(key: str, value: Any) -> Any:
    """Paths as seen from the folder in which they were typed: the notebooks run in their own."""
    if key not in PATHS or not isinstance(value, str | list):
        return value
    if key == "data.source" and isinstance(value, str):
        return _data(value, key) or value
    several = value.split(",") if isinstance(value, str) and key == "arena.plugins" else value
    if isinstance(several, list):
        return [_path(path) if isinstance(path, str) else path for path in several if path != ""]
    return _path(several) if several else several


def _path(text: str) -> str:
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{text}: {error}") from None


def _own_settings(run_dir: Path, values: dict[str, str]) -> dict[str, Any]:
    """The settings in the run's `config.json`, as a preset and what differs from it."""
    given = [name for name in ("SET", "SEED", "DATA", "NPROC") if values[name]]
    if given:
        raise UserError(f"package takes the settings that the run was made with; leave {', '.join(given)} out")
    made = load_run(run_dir).settings.model_dump(mode="json")
    default = make_settings(made["preset"]).model_dump(mode="json")
    overrides = {
        f"{section}.{key}": value
        for section in sections()
        for key, value in made[section].items()
        if value != default[section][key]
    }
    if "train.model_size" in overrides:  # else the size would decide the shape anew around the keys that differ
        overrides |= {f"model.{key}": made["model"][key] for key in SHAPE_KEYS}
    return {"preset": made["preset"], "overrides": overrides, "seed": made["seed"]}


def _check_preset(run_dir: Path, preset: str) -> None:
    """A run keeps its preset: `make no-training RUN=mine` must not turn a full run into a quick one."""
    content = read_json(run_dir / "config.json")[0]
    made = content.get("settings", {}).get("preset") if isinstance(content, dict) else None
    if preset in PRESETS and made not in (None, preset):
        raise UserError(f"run {run_dir.name} was made with PRESET={made}, not {preset}; give that, or another RUN=")


def clean_run(values: dict[str, str]) -> int:
    """Delete a run folder, and nothing that is not one."""
    if not values["RUN"]:
        raise UserError("clean-run needs the name of a run: make clean-run RUN=quick")
    path = runs_root() / check_run_name(values["RUN"])
    if path.name.startswith("reference-"):
        raise UserError(f"RUN={path.name} is a committed reference run; it is not deleted by make")
    if path.is_symlink() or not (path / "config.json").is_file():
        there = ", ".join(sorted(p.parent.name for p in runs_root().glob("*/config.json"))) or "none"
        raise UserError(f"RUN={path.name} is not a run folder below {runs_root()}; runs there: {there}")
    with hold(path, "make clean-run"):
        shutil.rmtree(path)
    print(f"deleted {path}")
    return 0


def _flag(name: str, values: dict[str, str]) -> bool:
    if values[name] not in FLAGS:
        raise UserError(f"{name}={values[name]!r} is neither 1 nor 0")
    return FLAGS[values[name]]


def _number(name: str, values: dict[str, str], *, default: int) -> int:
    text = values[name] or str(default)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name}={text!r} is not a whole number of {default} or more")
    return int(text)


def _data(text: str, name: str = "DATA") -> str | None:
    """Absolute: the notebooks run in their own folder."""
    if not text:
        return None
    path = Path(_path(text))
    if not path.exists() and not glob.glob(str(path), recursive=True):
        raise UserError(f"{name}={text} does not exist (looked for {path}); give a text file or a folder of them")
    return str(path)


def _command_line(command: str, values: dict[str, str]) -> str:
    """What to type to go on: the same without FORCE, which would start over."""
    given = [f"{name}={shlex.quote(value)}" for name, value in values.items() if value and name != "FORCE"]
    return " ".join(["make", command, *given])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
