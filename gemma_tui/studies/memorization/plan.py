"""What is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tui.studies.plan import option
from gemma_tui.studies.turns import PROMPT_FORMS


@dataclass(frozen=True)
class MemorizationPlan:
    """A model and its training data; every field is an option of ``gemma-tui memorization``."""

    model: str = option("nano", "model: a name, a folder, a hub id or a run")
    data: str = option(
        "",
        "what it was trained on: .jsonl or .txt, a folder with train and valid, or hf:REPO; several with commas",
        required=True,
    )
    held_out: str = option("", "text of the kind that it was not trained on; empty for the data's validation rows")
    reference: str = option(
        "", "model it is held against; empty for what a run or adapter started from, else none: log2 V bits a token"
    )
    checkpoints: bool = option(False, "at each checkpoint that is kept of the run, in place of its result")
    rows: int = option(0, "sequences of each set, drawn by the seed; 0 for all", low=0, high=10_000_000)
    max_tokens: int = option(
        64, "tokens of a sequence; the rest of a row is cut off", unit="tokens", low=2, high=131_072
    )
    prompts: str = option("turns", "how prompt and completion are written", choices=PROMPT_FORMS)
    batch_size: int = option(16, "sequences in a batch", low=1, high=4096)
    dtype: str | None = option(
        None, "dtype of the weights", choices=("float32", "bfloat16"), open_means="the device's default"
    )
    seed: int = option(0, "seed of the choice of sequences", low=0, high=2**31)
    recall: bool = option(False, "also ReCaLL: likelihoods after held-out sequences, which are then no non-members")
    extraction: str = option("", "also extraction: tokens of prefix and suffix, such as 50/50 or 32/32; empty for none")
    extraction_rows: int = option(
        64,
        "sequences of each set that are decoded for near matches; exact ones are found of all",
        low=1,
        high=1_000_000,
    )
    exposure: str = option("", "also exposure: the file on planted canaries that `gemma-tui canaries` wrote")
    exposure_strings: int = option(1000, "strings that each canary is ranked among", low=1, high=1_000_000)
    name: str = option("", "name of the run; empty for memorization")
