"""Long-Arena: what a model can do with its context, beside what it costs.

    python -m lshv2.arena runs/arena --tasks mqar induction --seeds 0 1 2

A small model a task, trained short and judged at every length up to 131,072 tokens, with LSH attention and with its
dense and sliding-window twins: the same parameters, data, steps and learning rate; where longer sequences are judged
than trained, dense attention also with logits that grow with the length. Rows go to `arena.jsonl` one by one; what is
there is not computed again, and a model that was trained is not trained again. Pictures are drawn beside them at the
end. `make arena` is phase 04_arena of a run (`lshv2.arena.phase`); a task of your own is one file (`lshv2.arena.task`).
"""
