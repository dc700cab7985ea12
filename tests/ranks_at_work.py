"""Several processes at once, as torchrun would start them, on the CPU through gloo.

    with Ranks() as ranks: results = ranks.run(4, "train", hashing="codebooks", sequence=2)     # of each process

One process imports torch and forks the others for each job: importing takes longer than the jobs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, BATCH, LENGTH, LIMIT = 4, 4, 288, 120  # 288 tokens: long enough for the tiled backend; seconds


class Ranks:
    """Asks the process that forks. `run` raises AssertionError with all tracebacks when a process fails."""

    def __enter__(self) -> Ranks:
        # float64 on the CPU wherever the tests run
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LSHV2_RUNNER": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=LIMIT)

    def run(self, world: int, job: str, **case: Any) -> list[Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([world, job, case]), file=self.process.stdin, flush=True)
        results = json.loads(self.process.stdout.readline())
        failed = [result["failed"] for result in results if "failed" in result]
        assert not failed, "\n".join(failed)
        return [result["done"] for result in results]


def train(
    sequence: int | None = None, steps: int = STEPS, folder: str = "", checkpoint: bool | str = False,
    compiled: bool = False, batch: int = BATCH, length: int = LENGTH, **changes: Any,
) -> dict[str, Any]:
    """Some steps in float64; with a folder, from its newest checkpoint on, and into one. Losses and norms of all."""
    import torch
    from small_models import SMALL, VOCAB

    from lshv2 import layers
    from lshv2.checkpoint import find_checkpoint, load_model, load_optimizer, owners, read_checkpoint, save_checkpoint
    from lshv2.config import ModelConfig
    from lshv2.model import LSHModel
    from lshv2.parallel.layout import plan
    from lshv2.parallel.ranks import join
    from lshv2.parallel.sharding import Sharded
    from lshv2.parallel.share import Share

    layers.CODEBOOK_TOKENS = 100  # of some thousand: which ones must not depend on the number of processes
    with join() as ranks:
        config = ModelConfig(**{**SMALL, "n_kv_heads": 4, "max_seq_len": 512, **changes})
        share = Share.of(ranks, plan(ranks.world, batch_size=batch, length=length, config=config, sequence=sequence))
        model = LSHModel(config, seed=0).double().train()
        model.gradient_checkpoint = checkpoint  # type: ignore[assignment]
        if ranks.world > 1:
            model.take_share(share)
        if compiled:
            model.compile_blocks("eager")
        sharded = Sharded(model, ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        begin = 0
        path = find_checkpoint(Path(folder))[0] if folder else None
        if path:
            tensors, state = read_checkpoint(path, owners(model, optimizer))
            load_model(model, tensors, path)
            load_optimizer(optimizer, tensors)
            begin = state["step"]
        losses, norms = [], []
        for step in range(begin, begin + steps):
            ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(step))
            ids[:, length // 2 :] = ids[:, : length // 2]
            labels = ids.clone()
            labels[0, : length // 3] = -100  # shares differ in how much of them is scored
            rows = share.rows(batch)
            loss, _ = sharded(ids[rows], labels[rows])
            loss.backward()
            norms.append(sharded.clip(0.5).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.update_hash()
            losses.append(ranks.total([loss.item()])[0] / ranks.world)
        if folder:
            save_checkpoint(Path(folder), begin + steps, model, optimizer, {}, 2, ranks=ranks)
        held = sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in model.parameters())
        tables = {name: x.flatten().tolist() for name, x in model.named_buffers() if "table" in name or "mean" in name}
        return {"losses": losses, "norms": norms, "held": held, "tables": tables}


def fit(folder: str, stop_rank: int | None = None) -> dict[str, Any]:
    """The language model of a run folder, by its Trainer; SIGTERM comes to one process alone, in its third step."""
    import signal

    from lshv2.parallel.layout import language_layout
    from lshv2.parallel.ranks import join
    from lshv2.runs import load_run
    from lshv2.stopping import Stopped
    from lshv2.train import LSHModel, Trainer, language_task

    run = load_run(folder)
    with join() as ranks:
        layout = language_layout(run.settings, ranks.world)
        model = LSHModel(run.settings.model, run.settings.seed)
        trainer = Trainer(run, language_task(run, layout, ranks), model, ranks, layout)
        step = trainer._train_step

        def signalled(*batch: Any) -> Any:
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*batch)

        if ranks.rank == stop_rank:
            trainer._train_step = signalled  # type: ignore[method-assign]
        try:
            result = trainer.fit()
            return {"stopped": "", "step": trainer.step, "loss": result.loss, "bits_per_byte": result.bits_per_byte}
        except Stopped as stopped:
            return {"stopped": str(stopped), "step": trainer.step}


def _serve() -> None:
    import small_models  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    import lshv2.parallel.exchange
    import lshv2.train  # noqa: F401

    said, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        world, job, case = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            children = [_fork(rank, world, job, case, Path(folder)) for rank in range(world)]
            for child in children:
                os.waitpid(child, 0)
            texts = [Path(folder) / str(rank) for rank in range(world)]
            results = [json.loads(p.read_text()) if p.exists() else {"failed": f"{p.name}: gone"} for p in texts]
        print(json.dumps(results), file=said, flush=True)


_ports: list[int] = []


def _fork(rank: int, world: int, job: str, case: dict[str, Any], folder: Path) -> int:
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _ports.append(free.getsockname()[1])
    child = os.fork()
    if child:
        return child
    import signal

    signal.alarm(LIMIT)  # a process that waits for one that failed
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_ports[-1]),
        }
    try:
        result = {"done": {"train": train, "fit": fit}[job](**case)}
    except BaseException:
        result = {"failed": f"rank {rank}: {traceback.format_exc()}"}
    (folder / str(rank)).write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    _serve()
