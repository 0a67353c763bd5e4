"""What the paper found, to be held against: Gat et al., arXiv:2509.04185, scores and speed-ups of fine-tuned models.

Speed-ups there are of forward passes, not of seconds; a block has 16 tokens. The bound γ is 0.1 (low) or 0.35 (high)
for reasoning, 0.35 or 0.6 for chat.
"""

from __future__ import annotations

from gemma_tui.figure import Table

COLUMNS = ("paper's model", "task", "NTP %", "ar %", "low %", "low x", "high %", "high x")
"""NTP was trained on next tokens alone; ar is the block model, decoded token by token; low and high are bounds γ."""

SCORES = (
    ("Llama-3.1-8B", "MATH500", 80.2, 81.6, 81.0, 3.55, 80.4, 3.23),
    ("Llama-3.1-8B", "AIME25", 33.3, 30.0, 30.0, 3.35, 23.3, 4.50),
    ("Llama-3.1-8B", "LCB v6", 31.5, 31.3, 31.7, 3.72, 29.9, 4.59),
    ("Llama-3.1-8B", "GSM8K", 85.3, 85.6, 84.2, 2.20, 84.0, 2.34),
    ("Llama-3.1-8B", "HumanEval+", 56.7, 57.9, 57.9, 2.61, 54.9, 2.95),
    ("Llama-3.1-8B", "MBPP", 70.4, 70.9, 69.5, 2.49, 67.2, 2.66),
    ("Qwen-3-8B", "MATH500", 86.6, 86.6, 85.0, 3.41, 85.4, 3.54),
    ("Qwen-3-8B", "AIME25", 33.3, 33.3, 33.3, 3.85, 26.6, 5.06),
    ("Qwen-3-8B", "LCB v6", 36.6, 37.4, 37.2, 3.92, 33.3, 5.36),
    ("Qwen-3-8B", "GSM8K", 90.1, 90.4, 90.1, 2.77, 88.7, 2.86),
    ("Qwen-3-8B", "HumanEval+", 69.5, 66.5, 66.5, 2.51, 65.2, 2.72),
    ("Qwen-3-8B", "MBPP", 78.0, 77.7, 77.5, 2.61, 74.6, 3.03),
)


def paper_table() -> Table:
    """Scores, and times fewer forward passes, marked as the paper's."""
    return Table("paper", COLUMNS, SCORES)
