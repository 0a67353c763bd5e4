"""LoRA of a 17 M Gemma-3 with the full vocabulary (batch 4 x 256, rank 8, all seven linears) against mlx_lm's trainer.

python -m tests.benchmarks.mlx_lora [ROUNDS] [STEPS]

Float32 on both sides. Memory is what MLX had allocated at most, and beside it the peak of the process.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from engines.gemma3 import Gemma3Config, parse_config
from tests.benchmarks.lora import LENGTH, LINEARS, RANK, tokens
from tests.benchmarks.measure import compare, report

BATCH = 4


def config() -> Gemma3Config:
    """The shape of the small model: nearly all of its 17 M parameters are the embedding."""
    return parse_config({
        "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
        "query_pre_attn_scalar": 32, "sliding_window": 512, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "tie_word_embeddings": True,
    })  # fmt: skip


def finish(seconds: list[float]) -> None:
    """Report the median of all steps but the first."""
    import mlx.core as mx

    report({"steps_per_second": 1 / statistics.median(seconds[1:]), "mlx_peak": float(mx.get_peak_memory())})


def gemma_tui(steps: int) -> None:
    """This program's MLX engine."""
    from engines import open_engine
    from engines.training import Batch, LoRASettings, TrainingSettings

    engine = open_engine("mlx")
    engine.initialise(config(), 0, "float32")
    engine.start_training(TrainingSettings(LoRASettings(RANK, 2 * RANK)))
    rows, seconds = tokens(steps, BATCH), []
    for step in range(steps):
        part = rows[step * BATCH : (step + 1) * BATCH]
        began = time.perf_counter()
        engine.train_step([Batch(part[:, :-1].copy(), part[:, 1:].copy())], 2e-4)
        seconds.append(time.perf_counter() - began)
    finish(seconds)


def mlx_lm(steps: int) -> None:
    """The loop of ``mlx_lm.lora`` on its own model."""
    import mlx.core as mx
    from mlx.optimizers import AdamW
    from mlx_lm.models.gemma3_text import Model, ModelArgs
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    shape = config().to_dict()
    model = Model(ModelArgs.from_dict(shape))
    mx.eval(model.parameters())
    model.freeze()
    keys = [f"{'mlp' if name in LINEARS[4:] else 'self_attn'}.{name}" for name in LINEARS]
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": keys})
    rows, seconds = tokens(steps, BATCH), []

    class Clock:
        """Takes the time of each step from mlx_lm's own report."""

        def on_train_loss_report(self, info: dict) -> None:
            seconds.append(1 / info["iterations_per_second"])

        def on_val_loss_report(self, info: dict) -> None:
            """There is no validation set."""

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=BATCH, iters=steps, steps_per_report=1, steps_per_save=steps + 1, max_seq_length=LENGTH + 1,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )  # fmt: skip
        train(model, AdamW(2e-4), [(row.tolist(), 0) for row in rows], None, arguments, training_callback=Clock())
    finish(seconds)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gemma_tui", steps]:
            gemma_tui(int(steps))
        case ["mlx_lm", steps]:
            mlx_lm(int(steps))
        case given:
            rounds, steps = (*map(int, given), *(3, 4)[len(given) :])
            title = "LoRA on a 17 M Gemma-3 with 262,144 tokens, MLX, float32"
            compare(title, "tests.benchmarks.mlx_lora", "gemma_tui", "mlx_lm", rounds, [str(steps)])
