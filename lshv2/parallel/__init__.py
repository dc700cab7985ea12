"""Several processes train one model: who is there, who computes what, where parameters lie, how they are saved.

    with join() as ranks:                                                    # ranks.py: torchrun's processes
        layout = plan(ranks.world, batch_size=8, length=4096, config=config)   # layout.py
        model.take_share(Share.of(ranks, layout))                            # share.py, exchange.py
        sharded = Sharded(model, ranks)                                      # sharding.py: FSDP2

Losses, gradients and hash tables are one process's but for the order of floating-point sums: sooner
or later a bucket id that is nearly a tie falls otherwise, and two such runs part (in float64 they do not).
Left out on purpose: tensor and pipeline parallelism (the model is small, contexts are long).
"""
