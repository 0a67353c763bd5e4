"""Steps of the merging methods against LoRA's on the 270M (batch 2 x 256, all seven linears, torch, float32).

python -m tests.benchmarks.methods [ROUNDS] [STEPS]

``rank1`` finds and merges an update of every matrix at every step, LoRA has rank 8 and AdamW; ``relora`` merges, draws
anew and prunes once in the measured steps; ``diagnosed`` is LoRA that is observed at each tenth step, spectra included.
"""

from __future__ import annotations

import sys
import time

from tests.benchmarks.lora import BATCH, LENGTH, RANK, tokens
from tests.benchmarks.measure import compare, report


def run(method: str, steps: int) -> None:
    """One method; seconds are those of all steps but the first, with all that belongs to them."""
    from engines import open_engine
    from engines.training import Batch, LoRASettings, Rank1Settings, TrainingSettings
    from gemma_tui.hub.models import resolve
    from gemma_tui.studies.diagnosis import Diagnoses, matrices_of, measured_decrease

    engine = open_engine("torch")
    info = engine.load(resolve("gemma-3-270m").folder, "float32")
    if method == "rank1":
        trainable = engine.start_training(TrainingSettings(rank1=Rank1Settings()))
    else:
        trainable = engine.start_training(TrainingSettings(LoRASettings(RANK, 2 * RANK), merging=method == "relora"))
    diagnoses, rows, began = Diagnoses(matrices_of(info.config)), tokens(steps), 0.0
    for step in range(steps):
        if step == 1:
            began = time.perf_counter()
        part = rows[step * BATCH : (step + 1) * BATCH]
        batch = Batch(part[:, :-1].copy(), part[:, 1:].copy())
        observe = method == "diagnosed" and step % 10 == 5
        result = engine.train_step([batch], 2e-4, observe)
        if method == "rank1":
            engine.merge("keep", step)
        if method == "relora" and step == steps - 1:
            engine.merge("fresh", step, True)
            engine.prune_optimizer("magnitude", 0.9, step)
        if observe:
            diagnoses.look(engine)
            measured_decrease(engine, [batch], result)
    seconds = (time.perf_counter() - began) / (steps - 1)
    report({
        "seconds_per_step": seconds, "tokens_per_second": BATCH * LENGTH / seconds, "trainable": trainable,
        "optimizer_bytes": engine.optimizer_bytes(),
    })  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case [("lora" | "rank1" | "relora" | "diagnosed") as method, steps]:
            run(method, int(steps))
        case given:
            rounds, steps = (*map(int, given), *(2, 11)[len(given) :])
            for method in ("rank1", "relora", "diagnosed"):
                compare(f"{method} on Gemma-3 270M", "tests.benchmarks.methods", method, "lora", rounds, [str(steps)])
