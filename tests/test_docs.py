"""The documentation against the code: targets, settings, artifacts, examples and links."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from project_files import FILES, PAGES, ROOT, page

import lshv2
from lshv2 import readme
from lshv2.__main__ import VARIABLES
from lshv2.presets import make_settings, sections
from lshv2.runner.phases import PHASE_TABLE
from lshv2.runs import PHASES, Run, read_jsonl

pytestmark = pytest.mark.skipif(not FILES, reason="not a git checkout: which files belong to the project is unknown")


def code_of(text: str) -> str:
    """What stands in backticks and in fenced blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))])


def test_make_targets_and_variables_in_the_docs_exist() -> None:
    makefile = page("Makefile")
    targets = {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", makefile, re.M) for name in line.split()}
    code = code_of(page("README.md") + page("CONTRIBUTING.md"))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert named <= targets, f"no such target: {sorted(named - targets)}"
    assert targets <= named, f"in neither README nor CONTRIBUTING: {sorted(targets - named)}"
    variables = set(re.findall(r"(?<![\w.])([A-Z][A-Z_0-9]+)=", code))
    known = {*VARIABLES, "TORCH_INDEX", "CUDA_VISIBLE_DEVICES", "LSHV2_COMMIT"}
    assert variables <= known, f"no such variable: {sorted(variables - known)}"


def test_settings_in_the_docs_exist_with_these_defaults() -> None:
    names = "|".join(sections())
    for name in PAGES:
        for section, key in re.findall(rf"(?<![\w./])({names})\.([a-z]\w+)\b(?!\(|/|\.)", code_of(page(name))):
            if key not in ("py", "json", "jsonl", "png", "bin", "safetensors"):  # file names
                assert key in sections()[section].model_fields, f"{name}: {section}.{key} is no setting"
        for target, given in re.findall(r'make ([\w-]+)[^`\n]* SET="([^"]+)"', page(name)):
            make_settings("full" if target == "full" else "quick", given.split())
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| `(.+?)` \| `(.+?)` \|$", page("README.md"), re.M)
    assert len(rows) >= 5, "README's table of settings is gone"
    for section, key, *values in rows:
        for preset, value in zip(("full", "quick"), values, strict=True):
            have = getattr(getattr(make_settings(preset), section), key)
            assert json.loads(value) == have, f"README: {section}.{key} is {have!r} in {preset}, not {value}"


GUIDE = {
    "model": dict(
        vocab_size=32_000, d_model=768, n_layers=24, n_heads=12, n_kv_heads=4, max_seq_len=131_072, bucket_size=128,
        use_ponder=True, weight_tied_layers=6,
    ),
    "train": dict(
        model_size="100M", seq_length=131_072, batch_size=1, num_epochs=5, learning_rate=1e-4,
        num_train_sequences=1_000, num_eval_sequences=100, gradient_checkpoint=True, profile_components=True,
    ),
    "benchmark": dict(
        sequence_lengths=(1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072), num_samples_per_length=10,
        max_memory_gb=16.0, timeout_seconds=300,
    ),
}


@pytest.mark.parametrize("section", GUIDE)
def test_full_is_the_usage_guide(section: str) -> None:
    full = getattr(make_settings("full"), section)
    assert {key: getattr(full, key) for key in GUIDE[section]} == GUIDE[section]


def test_artifacts_in_the_contract_are_written_by_their_phase() -> None:
    """The table of runs/README.md against the runner's: what it promises a phase must leave, and nothing unnamed."""
    rows = re.findall(r"^\| (`.+?) \| `([\w.]+)` \| ", page("runs/README.md"), re.M)
    assert len(rows) >= 10
    promised: dict[str, list[str]] = {}
    for cell, writer in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            folder = "data/" if name.startswith("data/") else folder
            path = name if name.startswith(folder) else folder + name
            promised.setdefault(writer, []).append(re.sub(r"<\w+>", "*", path))
    left = {phase.name: [artifact.path for artifact in phase.artifacts] for phase in PHASE_TABLE}
    everything = [path for paths in promised.values() for path in paths]
    unnamed = [path for paths in left.values() for path in paths if not any(_meets(path, p) for p in everything)]
    assert not unnamed, f"missing in runs/README.md: {unnamed}"
    for writer, paths in promised.items():
        phases = [writer] if writer in PHASES else ["05_report"] if writer in ("report", "package") else []
        for path in paths:
            assert not phases or any(_meets(p, path) for p in left[phases[0]]), f"{writer} does not leave {path}"
    sources = "".join(page(name) for name in FILES if fnmatch(name, "lshv2/run*"))
    run = Run(Path("r"), make_settings("test"))
    assert f"logs/{PHASES[0]}.log" == run.log(PHASES[0]).relative_to("r").as_posix()
    assert f"notebooks/{PHASES[0]}.ipynb" == run.notebook(PHASES[0]).relative_to("r").as_posix()
    for path in promised["runner"]:
        assert Path(path).name.replace("*", "") in sources, f"the runner's sources do not know {path}"


def _meets(one: str, other: str) -> bool:
    return fnmatch(one, other) or fnmatch(other, one) or fnmatch(one, f"{other}*") or one.startswith(other)


def test_the_readme_examples_run() -> None:
    text = re.sub(r"^```.*$", "", page("README.md"), flags=re.M)
    examples = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    assert len(examples.examples) >= 10
    said: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(examples, out=said.append).failed
    assert not failed, "".join(said)


def test_the_task_in_contributing_is_learned(tmp_path: Path) -> None:
    """As a reader would: the file as it stands, on a CPU, and what a line then says."""
    blocks = re.findall(r"^```python\n(.*?)^```", page("CONTRIBUTING.md"), re.M | re.S)
    (tmp_path / "echo.py").write_text(next(block for block in blocks if "class Echo" in block))
    command = [sys.executable, "-m", "lshv2.arena", "out", "--small", "--plugins", "echo.py", "--tasks", "echo",
               "--attentions", "lsh", "--seeds", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(tmp_path / "out" / "arena.jsonl")[0]
    assert [(row["seq_len"], row["trained_len"]) for row in rows] == [(64, 64), (256, 64)]
    assert rows[0]["value"] > 0.9 and rows[0]["chance"] == 1 / 15 and set(rows[0]["by"]["place"]) == set("0123")
    assert "echo lsh seed 0: begins, 400 steps" in done.stdout and "echo lsh seed 0, accuracy at 64: " in done.stdout


def anchors(name: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page(name), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page(name), flags=re.M | re.S))
    for link in links:
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        relative = path.resolve().relative_to(ROOT).as_posix()
        assert any(f == relative or f.startswith(f"{relative}/") for f in FILES), f"{name} links to {link}"
        assert not anchor or anchor in anchors(relative), f"{name} links to {link}: no such heading"


def test_the_changelog_and_the_readme_stay_as_they_are_meant() -> None:
    headings = re.findall(r"^## (.+)$", page("CHANGELOG.md"), re.M)
    assert lshv2.__version__ in headings[0], f"{lshv2.__version__} is not the newest entry of CHANGELOG.md"
    outside = re.sub(f"{readme.BEGIN}.*{readme.END}", "", page("README.md"), flags=re.S)
    assert len(outside.splitlines()) <= 120, "README.md is to be read in one go"
