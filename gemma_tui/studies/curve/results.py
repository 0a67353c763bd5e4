"""What a curve has found so far, as a figure: once for the screen, the command line and every export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_tui.errors import GemmaTuiError
from gemma_tui.figure import Figure, LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.studies.curve.measure import STUDY, plan_of
from gemma_tui.studies.curve.paper import paper_table
from gemma_tui.studies.curve.plan import CurvePlan, Way, ways_of
from gemma_tui.studies.generation import AR
from gemma_tui.studies.intervals import interval

COLUMNS = (
    "way", "exact %", "lost", "± 95 %", "nats/token", "agree", "fewer x", "faster x",
    "tokens/s", "tokens/pass", "tokens", "passes", "same texts", "block", "gamma",
)  # fmt: skip
"""What a way costs and saves comes first, and is no wider than a small terminal."""
PER_ROW = ("tokens", "passes", "exact", "compared", "equal", "first", "log_likelihoods", "texts", "ended")


@dataclass(frozen=True)
class Point:
    """One way to decode, over all rows so far.

    Attributes:
        exact: share of the rows with an answer whose text is that answer; None where there are none.
        lost: the share of exact answers less than next-token decoding has.
        half: half the width of its 95 % interval, see ``half_width``; None below two rows with an answer.
        log_likelihood: nats per token of what was written, under next-token prediction.
        agreement: share of places that hold the token of next-token decoding, up to the end of the shorter text.
        same: share of rows whose text is that of next-token decoding.
        fewer_passes: times fewer forward passes than next-token decoding made for the same rows.
        speed_up: in tokens a second.
    """

    way: Way
    exact: float | None
    lost: float | None
    half: float | None
    log_likelihood: float
    agreement: float
    same: float
    tokens: int
    passes: int
    fewer_passes: float
    tokens_per_second: float
    speed_up: float

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of all rows by passes of all rows."""
        return self.tokens / self.passes


@dataclass
class Curve:
    """A curve's events, gathered.

    Attributes:
        facts: of the start.
        rows: numbers of the rows, in the order in which they were decoded.
        per_row: for each way, one list entry for each of these rows.
        seconds: of each way.
    """

    plan: CurvePlan
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    per_row: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, events: Sequence[Row]) -> None:
        """Take in further events."""
        for event in events:
            if event.kind == "start":
                self.facts = dict(event.values)
            elif event.kind == STUDY:
                self.rows += event.values["rows"]
                for key, found in event.values["ways"].items():
                    mine = self.per_row.setdefault(key, {name: [] for name in PER_ROW})
                    for name in PER_ROW:
                        mine[name] += found[name]
                    self.seconds[key] = self.seconds.get(key, 0.0) + found["seconds"]

    def points(self) -> list[Point]:
        """A point for each way, next-token decoding first; none before the first rows are there."""
        return [self._point(way) for way in ways_of(self.plan) if way.key in self.per_row]

    def _point(self, way: Way) -> Point:
        mine, base = self.per_row[way.key], self.per_row[AR]
        answers = [(a, b) for a, b in zip(mine["exact"], base["exact"], strict=True) if a is not None]
        exact, lost, half = None, None, None
        if answers:
            right, first = np.array(answers, float).T
            exact, lost = float(right.mean()), float(np.mean(first - right))
            if way.gamma is None:
                half = 0.0  # it is compared with itself
            elif len(answers) > 1:
                half = half_width(first - right)
        tokens, passes = sum(mine["tokens"]), sum(mine["passes"])
        speed, slow = tokens / self.seconds[way.key], sum(base["tokens"]) / self.seconds[AR]
        return Point(
            way=way,
            exact=exact,
            lost=lost,
            half=half,
            log_likelihood=sum(mine["log_likelihoods"]) / tokens,
            agreement=sum(mine["equal"]) / max(1, sum(mine["compared"])),
            same=float(np.mean([first is None for first in mine["first"]])),
            tokens=tokens,
            passes=passes,
            fewer_passes=sum(base["passes"]) / passes,
            tokens_per_second=speed,
            speed_up=speed / slow,
        )


def half_width(differences: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean of differences row by row, each -1, 0 or 1; float64 ``[rows]``.

    Student's t where they differ. Where all n are alike, which it would take for certainty, at most 1 - 0.05^(1/n) of
    all rows are others, with 95 % (the exact rule of three: about 3/n), and each moves the mean by 1, or by 2 at most
    from an end.
    """
    if np.ptp(differences):
        return float(interval(differences)[1])
    return float((1 - 0.05 ** (1 / len(differences))) * (1 + abs(differences[0])))


def read_curve(store: RunStore, run: Run) -> Curve:
    """What a curve has found so far.

    Raises:
        UsageError: the run is another study.
        GemmaTuiError: nothing yet.
    """
    found = Curve(plan_of(run))
    found.add(store.events(run.run_id, limit=10_000_000))
    if not found.rows:
        raise GemmaTuiError(f"{run.run_id} has no rows yet: `gemma-tui runs resume {run.run_id}` goes on with it")
    return found


def curve_figure(curve: Curve) -> Figure:
    """Quality against passes saved and against speed, the table of the ways, and the paper's."""
    points, facts = curve.points(), curve.facts
    answered = points[0].exact is not None
    names = ("exact answers, %", _percent) if answered else ("log-likelihood, nats per token", _likelihood)
    charts = [
        _chart(f"{names[0]}, against forward passes saved", points, names[1], "times fewer passes", _fewer),
        _chart(f"{names[0]}, against speed", points, names[1], "times the tokens/s", _faster),
    ]
    notes = [
        f"{len(curve.rows):,} of {facts['rows']:,} rows, {facts['answers']:,} with an answer; {facts['batch_size']:,} "
        f"side by side, greedy, {facts['dtype']} on {facts['device']} with {facts['engine']}",
        "tokens are counted to the end of a text, passes too; seconds are all that decoding took, the prompt included",
        "± 95 %: Student's t of the differences row by row; where all are alike, what the rule of three leaves open",
        "nats/token: of what was written, under next-token prediction; agree: share of places with the token of "
        "next-token decoding; fewer x, faster x: times fewer passes, times the tokens/s",
        "the paper's table (arXiv:2509.04185) is of other models and tasks; its x is of passes, not of seconds",
    ]
    arrays = {
        f"{key}:{name}": np.array(values, float)
        for key, mine in curve.per_row.items()
        for name, values in mine.items()
        if name in ("tokens", "passes", "exact", "compared", "equal", "log_likelihoods")
    }
    tables = [Table("point", COLUMNS, [_cells(point) for point in points]), paper_table()]
    title = f"speed and quality: {curve.plan.model}"
    shown = {"plan": dict(vars(curve.plan)), **facts}
    return Figure(title, notes, charts=charts, tables=tables, arrays=arrays, facts=shown)


def _cells(point: Point) -> tuple[Any, ...]:
    way = point.way
    return (
        way.key, _percent(point), None if point.lost is None else 100 * point.lost,
        None if point.half is None else 100 * point.half, point.log_likelihood, point.agreement, point.fewer_passes,
        point.speed_up, point.tokens_per_second, point.tokens_per_pass, point.tokens, point.passes, point.same,
        way.block, "inf" if way.gamma == math.inf else way.gamma,
    )  # fmt: skip


def _percent(point: Point) -> float | None:
    return None if point.exact is None else 100 * point.exact


def _likelihood(point: Point) -> float:
    return point.log_likelihood


def _fewer(point: Point) -> float:
    return point.fewer_passes


def _faster(point: Point) -> float:
    return point.speed_up


def _chart(title: str, points: Sequence[Point], quality: Any, label: str, gain: Any) -> LineChart:
    """A line for each block size over the bounds, and next-token decoding as a point of its own."""
    lines = []
    for block in sorted({point.way.block for point in points if point.way.gamma is not None}):
        mine = [point for point in points if point.way.gamma is not None and point.way.block == block]
        lines.append(Series(f"block {block}", [gain(p) for p in mine], [quality(p) for p in mine]))
    base = next(point for point in points if point.way.gamma is None)
    lines.append(Series("next token", [1.0], [quality(base)]))
    return LineChart(title, lines, label)
