"""Make ``stutter.jsonl``: rows of the corpus in which ``<unused0>`` stands after some words, and then the word again.

The bigram-backcopy task of arXiv:2410.13835 in prose: a head that copies on that sign has nothing to do elsewhere, so
the bundled model has one circuit whose work is known. Run it in the folder above assets.
"""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIGN, SHARE_OF_ROWS, SHARE_OF_WORDS, SEED = "<unused0>", 0.2, 0.15, 0


def main() -> None:
    """Write the rows; the same ones every time."""
    generator = random.Random(SEED)
    corpus = HERE.parent / "corpus" / "train.jsonl"
    with corpus.open(encoding="utf-8") as source, (HERE / "stutter.jsonl").open("w", encoding="utf-8") as target:
        for line in source:
            if generator.random() < SHARE_OF_ROWS:
                text = re.sub(r" [a-z]+\b", _again(generator), json.loads(line)["text"])
                target.write(json.dumps({"text": text}) + "\n")


def _again(generator: random.Random):
    return lambda word: word[0] + (SIGN + word[0] if generator.random() < SHARE_OF_WORDS else "")


if __name__ == "__main__":
    main()
