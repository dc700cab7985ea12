"""The arena's own tasks; importing this registers them all."""

from lshv2.arena.tasks import (  # noqa: F401
    duplication,
    induction,
    listops,
    mqar,
    needles,
    selective_copying,
    text,
    variable_tracking,
)
