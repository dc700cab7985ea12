"""Which attention? Twins that differ in one choice, several seeds each, on every GPU of a machine.

    python -m lshv2.ablation OUT                                  # the whole study, most informative jobs first
    python -m lshv2.ablation OUT --time-limit 560                 # start no job that would end later; again to go on
    python -m lshv2.ablation OUT --tasks language-2048 --variants codebooks_half dense_half --seeds 0 1 --steps 500
    python -m lshv2.ablation OUT --jobs-a-gpu 2                   # two at once on each GPU, whose steps are not timed
    python -m lshv2.ablation OUT --tasks depth-2048               # does pondering pay? against fixed depths
    python -m lshv2.ablation OUT --report                         # ablation.json, .md and .png from the rows there are

Rotary choices, hashes, rounds x bucket size x window, token shift, and dense twins with each of them, on real text and
on associative recall, at several lengths; and PonderNet's halting against fixed depths (`depth_variants`, `depth`,
`depth_summary`). `variants` says what is compared and in which order, `heads` holds attention
that the product does not offer, `job` trains and evaluates one, `lookup` measures what limits it, `pool` spreads jobs
over GPUs and survives a kill, `summary` and `report` say what may be concluded. Quality is what is measured; step times
are noted beside it, for quality per millisecond, where they mean something.
"""
