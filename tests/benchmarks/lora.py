"""LoRA on the 270M (batch 2 x 256, rank 8, all seven linears, float32 on the CPU) against PEFT + transformers' Trainer.

python -m tests.benchmarks.lora [ROUNDS] [STEPS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

import numpy as np

from tests.benchmarks.measure import compare, report

BATCH, LENGTH, RANK = 2, 256, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tokens(steps: int, batch: int = BATCH) -> np.ndarray:
    """int32 ``[steps * batch, length + 1]``, the same for both sides."""
    return np.random.default_rng(0).integers(300, 200_000, (steps * batch, LENGTH + 1)).astype(np.int32)


def gemma_tui(steps: int) -> None:
    """This program's torch engine."""
    from engines import open_engine
    from engines.training import Batch, LoRASettings, TrainingSettings
    from gemma_tui.hub.models import resolve

    engine = open_engine("torch")
    engine.load(resolve("gemma-3-270m").folder, "float32")
    engine.start_training(TrainingSettings(LoRASettings(RANK, 2 * RANK)))
    rows, seconds = tokens(steps), []
    for step in range(steps):
        part = rows[step * BATCH : (step + 1) * BATCH]
        began = time.perf_counter()
        engine.train_step([Batch(part[:, :-1].copy(), part[:, 1:].copy())], 2e-4)
        seconds.append(time.perf_counter() - began)
    report({"tokens_per_second": BATCH * LENGTH / statistics.median(seconds[1:])})


def trainer(steps: int) -> None:
    """PEFT on transformers' model, trained by its Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from gemma_tui.hub.models import resolve

    model = AutoModelForCausalLM.from_pretrained(resolve("gemma-3-270m").folder, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    # A label is predicted from the position before, so LENGTH inputs give LENGTH - 1 supervised tokens here.
    rows = [{"input_ids": row[:-1].tolist(), "labels": row[:-1].tolist()} for row in tokens(steps)]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-4, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(get_peft_model(model, lora), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    report({"tokens_per_second": BATCH * LENGTH / statistics.median(seconds[1:])})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gemma_tui", steps]:
            gemma_tui(int(steps))
        case ["trainer", steps]:
            trainer(int(steps))
        case given:
            rounds, steps = (*map(int, given), *(3, 4)[len(given) :])
            title = "LoRA on Gemma-3 270M, torch, float32"
            compare(title, "tests.benchmarks.lora", "gemma_tui", "trainer", rounds, [str(steps)])
