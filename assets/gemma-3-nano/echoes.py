"""Make ``echoes.jsonl``: lists of random words said again and again, from which a small model learns to look back.

python assets/gemma-3-nano/echoes.py, in the folder above assets. Prose of this size seldom repeats itself word by
word, so a model trained on it alone forms no induction heads, and no sink to rest them on.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS, WORDS, SEED = 2500, 2000, 0
PERIODS, LENGTH = (4, 36), 150


def main() -> None:
    """Write the rows; the same ones every time."""
    rows = [json.loads(line)["text"] for line in (HERE.parent / "corpus" / "train.jsonl").open(encoding="utf-8")]
    counts = Counter(word for row in rows for word in re.findall(r"[a-z]+", row))
    words = [word for word, _ in counts.most_common(WORDS)]
    generator = random.Random(SEED)
    with (HERE / "echoes.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            period = generator.randint(*PERIODS)
            part = generator.sample(words, period)
            row = " ".join((part * (LENGTH // period + 1))[:LENGTH])
            file.write(json.dumps({"text": row}) + "\n")


if __name__ == "__main__":
    main()
