"""Command lines: what a person types, read into a dataclass, with a --help in two boxes.

Each program names the options that people use first; the others stand in a second box. The text of an option
is the string under its field. Neither torch nor a simulator is needed here, and `tyro` only for reading.

    config = read_command_line(TrainConfig, __doc__, ("data", "init"))     # Refused for values that cannot be
    config = type_in(DemoConfig, __doc__, ("out", "suite"), "python -m simulator record")  # or ends in a line
    parse_numbers("0,3,5-7", "--task-ids")                                 # [0, 3, 5, 6, 7]
    pytest tests/test_commands.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

from files import Refused


def read_command_line(
    config: type,
    description: str | None,
    first: Sequence[str],
    args: Sequence[str] | None = None,
    prog: str | None = None,
) -> Any:
    """Read flags into a config; --help lays them out in two boxes, what people use first, then the rest."""
    import tyro

    hints, docs = get_type_hints(config, include_extras=True), field_docs(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    boxes = {"often": first, "more": [name for name in fields if name not in first]}
    quiet = ("None", "''", "", "()")  # defaults that say nothing; the text says what happens then
    said = lambda default: "" if default in quiet else f"(default: {default})"  # noqa: E731

    def option(name: str) -> tuple:
        how = tyro.conf.arg(help=docs.get(name), help_behavior_hint=said)  # a group of options has none
        one = fields[name]
        made = dataclasses.field(default=one.default, default_factory=one.default_factory)
        return name, Annotated[hints[name], how], made

    def box(name: str, names: Sequence[str]) -> tuple:
        return name, dataclasses.make_dataclass(name, map(option, names), frozen=True)

    filled = {name: names for name, names in boxes.items() if names}
    both = dataclasses.make_dataclass("both", [box(*pair) for pair in filled.items()], frozen=True)
    rank0 = os.environ.get("RANK", "0") == "0"
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    options = {"description": description, "console_outputs": rank0, "config": style}
    try:
        found = tyro.cli(both, prog=prog, args=args, **options)
    except BrokenPipeError:  # as in --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    return config(
        **{name: getattr(getattr(found, key), name) for key, names in filled.items() for name in names}
    )


def type_in(
    config: type, description: str | None, first: Sequence[str], prog: str, args: Sequence[str] | None = None
) -> Any:
    """Read flags as `read_command_line` does; what cannot be ends the program in one line."""
    try:
        return read_command_line(config, description, first, args, prog)
    except ValueError as error:
        sys.exit(f"error: {error}")


def field_docs(config: type) -> dict[str, str]:
    """Read the text that stands under each field of a dataclass and of those that it inherits from."""
    docs = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = inspect.cleandoc(text.value.value)
    return docs


def parse_numbers(text: str, flag: str, limit: int | None = None) -> list[int]:
    """Return the numbers of '0,3,5-7' in the order given, none of ''; with a limit they lie in 0..limit-1.

    Raises Refused for anything else, or a repetition.
    """
    numbers: list[int] = []
    for piece in text.split(",") if text else ():
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise Refused(f"{flag} {text!r} is no list of numbers: write it like 0,3,5-7")
        if limit is not None and int(last or first) >= limit:
            raise Refused(f"{flag} {text!r} names {last or first}: choose from 0..{limit - 1}")
        if int(last or first) - int(first) > 10**7:
            raise Refused(f"{flag} {text!r} names more than ten million: name fewer")
        numbers.extend(range(int(first), int(last or first) + 1))
    if len(set(numbers)) < len(numbers):
        raise Refused(f"{flag} {text!r} names a number twice: name each once")
    return numbers
