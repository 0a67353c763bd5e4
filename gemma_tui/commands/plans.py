"""Plans as command-line options: every field of a plan class is one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma_tui.errors import UsageError
from gemma_tui.studies.plan import build, options

P = TypeVar("P")


def add_options(command: argparse._ActionsContainer, plan: type, left_out: tuple[str, ...] = ()) -> None:
    """Give a command the options of a plan; what is not given is not in the result."""
    for o in options(plan):
        if o.name in left_out:
            continue
        default = o.open_means if o.default is None else o.default
        shown = f" (default {default})" if default not in ("", False) else ""
        hint = f"; {o.hint}" if o.hint else ""
        text = f"{o.help}{hint}{shown}".replace("%", "%%")
        if o.kind is bool:
            command.add_argument(o.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[o.kind]
            command.add_argument(o.flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def plan_from(plan: type[P], args: argparse.Namespace, values: Mapping[str, Any], where: str) -> P:
    """The plan that ``values`` and, over them, the given options make.

    Raises:
        UsageError: an unknown key, a missing or wrong value.
    """
    names = {o.name for o in options(plan)}
    # argparse makes an empty list of the text "--".
    given = {key: "--" if value == [] else value for key, value in vars(args).items() if key in names}
    return build(plan, {**values, **given}, where)


def refuse(given: set[str], why: str) -> None:
    """Refuse options that do not go with the others.

    Raises:
        UsageError: there are some.
    """
    if given:
        raise UsageError(f"--{min(given).replace('_', '-')}: {why}")
