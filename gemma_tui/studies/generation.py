"""Letting a model write, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from engines.base import Engine, Sampling
from gemma_tui.errors import UsageError
from gemma_tui.tokenizer import END_OF_TURN, EOS, Stream, Tokenizer

STOP_IDS = (EOS, END_OF_TURN)


@dataclass
class Generation:
    """What was written so far; ``text`` is not cleaned."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False
    """Whether the model itself ended the text."""


def check_sampling(sampling: Sampling) -> Sampling:
    """The same sampling, with Gemma's stop tokens.

    Raises:
        UsageError: a value is out of range.
    """
    if not 1 <= sampling.max_tokens <= 1_000_000:
        raise UsageError(f"max tokens is {sampling.max_tokens}; 1 to 1,000,000 are possible")
    if not 0 <= sampling.temperature <= 100:
        raise UsageError(f"temperature is {sampling.temperature}; 0 (greedy) to 100 is possible")
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"top p is {sampling.top_p}; more than 0 and at most 1 is possible")
    if sampling.top_k < 0 or sampling.seed < 0:
        raise UsageError("top k and seed must not be negative")
    return replace(sampling, stop_ids=STOP_IDS)


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Prompt tokens with one ``<bos>``; for a chat, in Gemma's turns, open for the model's answer."""
    if chat:
        text = f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n"
    return tokenizer.encode(text)


def write(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling, generation: Generation
) -> Iterator[str]:
    """Yield the text each new token completes, not cleaned, and keep it in ``generation``; close it to stop."""
    stream = Stream(tokenizer)
    for token in engine.generate(prompt, sampling):
        generation.tokens.append(token)
        if token in sampling.stop_ids:
            generation.stopped = True
            break
        piece = stream.push(token)
        generation.text += piece
        yield piece
    rest = stream.flush()
    generation.text += rest
    yield rest
