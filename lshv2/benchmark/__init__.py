"""Long-Arena: what the model costs at each length, LSH and its dense twin side by side.

    from lshv2.benchmark import run_benchmark
    summary = run_benchmark(run)            # writes benchmark_summary.json after every row

suite    the cases in order, resuming
rows     a row from its processes, the fits to rows
process  one job in its own process under a time and a memory limit
worker   that process: builds the model, measures one (attention, seq_len, batch_size), reports as it goes

Left out on purpose: several GPUs (a row is one process on one device) and any extrapolation.
"""

from lshv2.benchmark.suite import run_benchmark

__all__ = ["run_benchmark"]
