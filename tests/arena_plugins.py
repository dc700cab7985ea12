"""Plugins of the arena, for its tests, and an end to what they registered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lshv2.arena.task import REGISTERED

HEAD = "import numpy as np\nfrom lshv2.arena.task import ArenaTask, Examples, register\n"
DRAWS = HEAD + """
@register
class Mine(ArenaTask):
    name, vocab_size = "mine", 8
    def draw(self, generator, n, length):
        ids = generator.integers(8, size=(n, length))
        labels, groups = np.full_like(ids, -100), dict()
        labels[:, -1] = ids[:, -1]
        {wrong}
        return Examples(ids, labels, groups)
"""


@pytest.fixture(autouse=True)
def only_known_tasks() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)
