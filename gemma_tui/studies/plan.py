"""Plans: one dataclass per study, whose fields make the form, the command line, the TOML file and the help."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemma_tui.errors import UsageError

P = TypeVar("P")
MAX_PLAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Option:
    """One field of a plan.

    Attributes:
        kind: ``str``, ``int``, ``float`` or ``bool``.
        optional: whether it may be left open (None), in which case ``open_means`` tells what happens.
        low, high: the allowed range, ends included; None for no bound.
        methods, optimizers, modes, views, decoders: those that honour it; empty for all.
        fresh: whether only new weights honour it.
    """

    name: str
    kind: type
    default: Any
    help: str
    group: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    optional: bool = False
    open_means: str = ""
    methods: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
    fresh: bool = False
    required: bool = False

    @property
    def flag(self) -> str:
        """The command-line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def hint(self) -> str:
        """Unit, choices or range, as a person would read them."""
        if self.choices:
            return " | ".join(self.choices)
        bounds = ""
        if self.low is not None and self.high is not None:
            bounds = f"{_plain(self.low)} to {_plain(self.high)}"
        elif self.low is not None:
            bounds = f"{_plain(self.low)} or more"
        return " ".join(part for part in (bounds, self.unit) if part)

    @property
    def bound(self) -> dict[str, tuple[Any, ...]]:
        """The options that decide whether it is honoured, with the values for which it is."""
        every = {
            "method": self.methods, "optimizer": self.optimizers, "mode": self.modes, "view": self.views,
            "decoder": self.decoders,
        }  # fmt: skip
        return {name: allowed for name, allowed in every.items() if allowed} | (
            {"fresh": (True,)} if self.fresh else {}
        )

    def honoured(self, values: Mapping[str, Any]) -> bool:
        """Whether it makes a difference beside the other values of a plan."""
        return all(values.get(name) in allowed for name, allowed in self.bound.items())


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def option(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with what its form, its command-line option and its check need; see ``Option``."""
    return dataclasses.field(default=default, metadata={"help": help, **facts})


def options(plan: type) -> list[Option]:
    """The options of a plan class, in the order of its fields."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    found = []
    for field in dataclasses.fields(plan):
        written = str(field.type)
        kind = kinds[written.removesuffix(" | None")]
        found.append(Option(field.name, kind, field.default, optional=written.endswith("| None"), **field.metadata))
    return found


def build(plan: type[P], values: Mapping[str, Any], where: str = "plan") -> P:
    """A plan from values as a form, a command line or a TOML file gives them; what is missing keeps its default.

    Raises:
        UsageError: an unknown key, a missing required value, a wrong type or a value out of range.
    """
    known = {o.name: o for o in options(plan)}
    for key in values:
        if key not in known:
            near = [name for name in known if name.startswith(str(key)[:4])] or sorted(known)
            raise UsageError(f"{where}: unknown option {str(key)[:40]!r}; perhaps {', '.join(near[:4])}")
    parsed = {key: parse(known[key], value, where) for key, value in values.items()}
    for name, o in known.items():
        if o.required and not parsed.get(name, o.default):
            raise UsageError(f"{where}: {o.flag} is needed: {o.help}")
    return plan(**parsed)


def parse(o: Option, value: Any, where: str) -> Any:
    """One value in the option's type and range.

    Raises:
        UsageError: it is neither.
    """
    if o.optional and value in (None, ""):
        return None
    try:
        parsed = _convert(o, value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UsageError(f"{where}: {o.name} is {_shown(value)}; {_wanted(o)} is needed") from None
    if o.choices and parsed not in o.choices:
        raise UsageError(f"{where}: {o.name} is {str(value)[:40]!r}; choose {' | '.join(o.choices)}")
    below = o.low is not None and not parsed >= o.low
    above = o.high is not None and not parsed <= o.high
    if below or above:
        raise UsageError(f"{where}: {o.name} is {_shown(value)}; {_wanted(o)} is needed")
    return parsed


def _convert(o: Option, value: Any) -> Any:
    if o.kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
    if isinstance(value, bool | dict | list):
        raise TypeError
    if o.kind is int and isinstance(value, float):
        raise TypeError
    if o.kind is int and isinstance(value, str):
        return int(value.replace("_", "").replace(",", ""))
    return o.kind(value)


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:40])
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def _wanted(o: Option) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    bounds = f" ({o.hint})" if o.hint and o.kind in (int, float) else ""
    return names[o.kind] + bounds


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a plan file.

    Raises:
        UsageError: the file is missing, too large or no TOML.
    """
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise UsageError(f"{path} is over 1 MiB, so it is no plan: name another file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML ({str(error)[:80]}): mend the file") from None


def honoured(plan: P, deciding: Collection[str] | None = None) -> P:
    """The plan with the defaults where it makes no difference what it says.

    Args:
        deciding: leave alone what does not hang on one of these options; None for all.
    """
    values = {o.name: getattr(plan, o.name) for o in options(type(plan))}
    ignored = {
        o.name: o.default for o in options(type(plan))
        if not o.honoured(values) and (deciding is None or not o.bound.keys().isdisjoint(deciding))
    }  # fmt: skip
    return type(plan)(**values | ignored)


def check_honoured(plan: Any) -> None:
    """Refuse an option that would be ignored.

    Raises:
        UsageError: one is set that makes no difference beside the others.
    """
    kept = honoured(plan)
    for o in options(type(plan)):
        if getattr(plan, o.name) == getattr(kept, o.name):
            continue
        if o.fresh and not plan.fresh:
            raise UsageError(f"{o.name}: {o.flag} is for new weights: add --fresh, or leave it out")
        beside = [f"--{n} {getattr(plan, n)}" for n, allowed in o.bound.items() if getattr(plan, n) not in allowed]
        raise UsageError(f"{o.name}: {o.flag} makes no difference with {' '.join(beside)}: leave it out")


def changed(plan: Any) -> dict[str, Any]:
    """The values that differ from the defaults."""
    return {o.name: v for o in options(type(plan)) if (v := getattr(plan, o.name)) != o.default}


def command(verb: Sequence[str], plan: Any) -> str:
    """The command that runs this plan, after the words of ``verb``."""
    parts = ["gemma-tui", *verb]
    for o in options(type(plan)):
        value = getattr(plan, o.name)
        if value == o.default:
            continue
        if o.kind is bool:
            parts.append(o.flag if value else "--no-" + o.flag[2:])
        else:
            text = _number(value) if isinstance(value, float) else str(value)
            # A value that looks like an option has to be tied to its own.
            parts += [f"{o.flag}={text}"] if text.startswith("-") else [o.flag, text]
    return shlex.join(parts)


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
