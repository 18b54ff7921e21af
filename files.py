"""What comes from outside, JSON, tensors and command lines: errors of one line, files that appear whole.

    from files import Refused, parse_numbers, read_json, read_tensors, type_in
    weights = read_tensors(Path("runs/demo/E0-n40000-s0/last/model.safetensors"))    # name -> tensor
    config = type_in(DemoConfig, __doc__, ("out", "suite"), "python -m simulator record")
    parse_numbers("0,3,5-7", "--task-ids")                                           # [0, 3, 5, 6, 7]
    pytest tests/test_commands.py tests/test_hostile.py

Tensors that are read stay mapped from their file; what replaces it is another file under the same name. Of a
program's options --help shows first what people use first; an option's text is the string under its field.
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import fcntl
import gzip
import inspect
import io
import json
import os
import socket
import sys
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, Union, get_args, get_origin, get_type_hints

LARGEST = 10**15  # of any number that a person gives
Shape = Any  # of a JSON value, as `misfit` reads it
NUMBER = int | float
UNPACKED = 2**28  # bytes that a packed file may come to

if TYPE_CHECKING:
    from torch import Tensor


class Refused(ValueError):
    """What a person gave cannot be used: one line that says what is wrong, the value seen, and what to type.

    Programs print it as that line. Any other error is ours, and keeps its traceback.
    """

    def __init__(self, line: str) -> None:
        super().__init__(plain(line))  # names in it may be a stranger's


def plain(text: str) -> str:
    """Leave out what steers a terminal or breaks a page: control, format and lone surrogate characters."""
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def plain_name(name: object, where: object) -> str:
    """Return a file's name that a stranger's file gives, if it is one: no folder, no way out of its own.

    Raises Refused, naming `where` it stands.
    """
    bad = not isinstance(name, str) or not name or name.startswith(".") or not name.isprintable()
    if bad or set(name) & set("/\\:"):
        raise Refused(f"{where} names a file {name!r}: only a plain file name beside it is read")
    return name


def inside(root: Path, path: Path) -> Path:
    """Return a path that a stranger's data set names or holds, if it stays in its folder `root`, links too.

    The hub's own folders are links to blobs/ beside snapshots/. Raises Refused.
    """
    try:
        real, home = path.resolve(), root.resolve()
    except RuntimeError as error:
        raise Refused(f"{path} is a link to itself: copy what is meant into the folder") from error
    if not any(real.is_relative_to(place) for place in (home, home.parent.parent / "blobs")):
        raise Refused(f"{path} leads out of {root}, to {real}: copy what is meant into the folder")
    return path


def number_from_environment(name: str, default: int) -> int:
    """Return what the environment sets of a recipe (TOTAL_SAMPLES, DEMOS, EPISODES), if it is one number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def check_numbers(config: object) -> None:
    """Refuse a number of a configuration that is not finite or out of its range.

    Ranges, both ends in them, stand in the mapping `limits` of a dataclass and of those above it.
    """
    limits: dict[str, tuple[float, float]] = {}
    for cls in reversed(type(config).__mro__):
        limits |= vars(cls).get("limits", {})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        low, high = limits.get(field.name, (-LARGEST, LARGEST))
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or low <= number <= high:
                continue
            flag = f"--{field.name.replace('_', '-')} {number}"
            if not abs(number) <= LARGEST:
                raise Refused(f"{flag} is no finite number, or too large: give another, or leave it out")
            raise Refused(f"{flag} must be at " + (f"least {low:g}" if number < low else f"most {high:g}"))


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights that are not finite: what they compute would be taken for a policy that fails."""
    for name, tensor in tensors.items():
        # The sum is one pass without a copy; where it is not finite, it may have overflowed.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise Refused(
                f"{where}: {count:,} of {tensor.numel():,} numbers of {name} are not finite: the weights are "
                "damaged or their training diverged; take an earlier checkpoint"
            )


# ---- reading ------------------------------------------------------------------------------------------


def misfit(value: object, shape: Shape, name: str = "") -> str:
    """Say what keeps a JSON value from having a shape; "" where it has it.

    Args: shape, a type or several (int | None; numbers are neither true nor false), a Literal, a tuple of
    shapes to choose from, a list of one shape, or a dictionary: of keys that must be there, of "key?" that
    may be, or of `str` for whatever keys there are.
    """
    what = name or "it"
    if isinstance(shape, tuple):
        found = {misfit(value, each, name): type(each) for each in shape}
        alike = (why for why, kind in found.items() if kind is type(value))
        closest = next(alike, f"{what} is {value!r:.40}")
        return "" if "" in found else closest
    if not isinstance(shape, dict | list):
        kinds, literal = get_args(shape) or (shape,), get_origin(shape) is Literal
        fits = isinstance(value, str) and value in kinds if literal else isinstance(value, kinds)
        if isinstance(value, bool):
            fits = bool in kinds or object in kinds
        return "" if fits else f"{what} is {value!r:.40}"
    if not isinstance(value, type(shape)):
        return f"{what} is {value!r:.40}, not {'an object' if isinstance(shape, dict) else 'a list'}"
    if isinstance(shape, list):
        inner = (misfit(each, shape[0], f"{name}[{i}]") for i, each in enumerate(value))
        return next(filter(None, inner), "")
    if missing := [k for k in shape if k is not str and not k.endswith("?") and k not in value]:
        return f"{what} has no {', '.join(missing)}"
    dot = f"{name}." if name else ""
    known = {k.removesuffix("?"): each for k, each in shape.items() if k is not str}
    found = ((key, known.get(key, shape.get(str))) for key in value)
    inner = (misfit(value[key], each, f"{dot}{key}") for key, each in found if each is not None)
    return next(filter(None, inner), "")


def shape_of(hint: Any) -> Shape:
    """Give the shape of a type hint's JSON; of a dataclass's, none of whose fields need be there."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints, fields = get_type_hints(hint), dataclasses.fields(hint)
        return {f"{field.name}?": shape_of(hints[field.name]) for field in fields}
    if origin in (list, tuple):
        return [shape_of(args[0])]
    if origin is dict:
        return {str: shape_of(args[1])}
    if origin in (Union, UnionType):
        return tuple(map(shape_of, args))
    return {Any: object, float: NUMBER}.get(hint, hint)


def parse_json(text: str | bytes, shape: Shape | None = None) -> Any:
    """Read a JSON object, or what `shape` says. Raises Refused that says what is wrong with it."""
    try:
        value, why = json.loads(text), ""
    except RecursionError:
        why = "nested too deep"
    except UnicodeDecodeError:
        why = "its bytes are not UTF-8"
    except ValueError as error:
        why = str(error)
    if why or (shape is None and not isinstance(value, dict)):
        raise Refused(f"it is not a JSON object ({why or f'{value!r:.40}'})")
    if shape is not None and (why := misfit(value, shape)):
        raise Refused(why)
    return value


def read_bytes(path: Path, again: str) -> bytes:
    """Read a file; one that is missing, or cannot be read, is Refused in the system's words."""
    try:
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise Refused(f"{path} is missing: {again}") from error
        raise Refused(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path, shape: Shape | None = None, again: str = "copy the checkpoint again") -> dict:
    """Read a JSON file of a shape; one that is missing, broken or of another shape is Refused by name."""
    content = read_bytes(path, again)
    try:
        return parse_json(content, shape)
    except ValueError as error:
        raise Refused(f"{path} cannot be used, {error}: {again}") from error


def json_lines(path: Path, shape: Shape | None = None) -> Iterator[tuple[int, dict, str]]:
    """Yield number, object and "" of each line of a JSONL file; or what is wrong with it, and no object.

    Nothing for a file that is not there, packed (.gz) neither. A last line that is being written, or was cut
    off, is left out.
    """
    content = read_bytes(path, "") if path.is_file() else unpacked(path.with_name(f"{path.name}.gz"))
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_json(line, shape), ""
            except ValueError as error:
                if number < len(lines):
                    yield number, {}, str(error)


def unpacked(path: Path) -> bytes:
    """Return what a gzip file holds; nothing for one that is not there, Refused for one that is damaged."""
    try:
        with gzip.open(path) as file:
            content = file.read(UNPACKED + 1)
    except FileNotFoundError:
        return b""
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{path} cannot be unpacked ({error}): copy it again") from error
    if len(content) > UNPACKED:
        raise Refused(f"{path} unpacks to more than {UNPACKED:,} bytes: no run writes so much")
    return content


# What numpy raises for a file that is no array, or half of one.
NO_ARRAY = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    TokenError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, memory-mapped; a missing or broken one is Refused by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # imports torch, which reports and the simulator do without

    if not path.is_file():
        raise Refused(f"{path} is missing: a checkpoint folder needs it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} cannot be read ({error}): copy the checkpoint again") from error


# ---- writing ------------------------------------------------------------------------------------------


# What a disk says that is full, read-only or broken: nobody's mistake here, and no traceback helps.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO}


class Unwritable(OSError):
    """A file that a disk refuses to take; programs print it as one line."""

    def __str__(self) -> str:
        again = "make room or choose another folder; the same command goes on from here"
        return f"{self.filename} cannot be written ({self.strerror}): {again}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give what a disk refuses the name of the file that could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK or isinstance(error, Unwritable):
            raise
        raise Unwritable(error.errno, error.strerror, str(path)) from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; once it is on the disk, it takes its own.

    A kill or a full disk leaves the file before, or none; what is half there goes, but after a kill.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with naming(path):
            yield partial
            to_disk(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside, then rename it: tensors may be mapped from the one it replaces."""
    from safetensors.torch import save_file

    with beside(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.chmod(mode)  # safetensors makes files that nobody else may read


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON."""
    replace_text(path, to_json(content) + "\n")


def replace_text(path: Path, text: str | bytes) -> None:
    """Write a file."""
    with beside(path) as partial:
        partial.write_bytes(text.encode() if isinstance(text, str) else text)


def to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; some say only here that it is full."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def append_json(path: Path, line: dict) -> None:
    """Append one line of JSON, all of it or nothing."""
    content = json.dumps(line).encode() + b"\n"
    with naming(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


# ---- one writer ---------------------------------------------------------------------------------------


class Busy(Refused):
    """Another process is at it."""


@contextmanager
def locked(
    path: Path,
    command: str,
    waits: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Iterator[TextIO]:
    """Hold a lock file; where another process holds it, wait while `waits` says so, or raise Busy: who it is.

    The system lets go of it when its holder ends, however that ends.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", errors="replace")
    with file:
        told = ""
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = f"{plain(file.read(300)) or 'another process'} is at it"
            except OSError as error:  # a file system without locks
                say(f"warning: {file.name} cannot be locked ({error}): see that no two processes use it")
                break
            if not waits():
                raise Busy(holder)
            if holder != told:
                say(f"waiting for {path.with_suffix('')}: {holder}")
            told = holder
            time.sleep(0.5)
        sign(file, os.getpid(), command)
        yield file


def sign(file: TextIO, process: int, command: str) -> None:
    """Write who holds a lock."""
    file.truncate(0)
    file.write(f"process {process} on {socket.gethostname()}, since {time.strftime('%F %T')}: {command}")
    file.flush()


@contextmanager
def only_writer(out: Path, program: str, grace: float = 5.0) -> Iterator[None]:
    """Be the one process of a program that writes into a folder; Busy where there is another.

    grace: seconds that one that was killed has to end, as where torchrun starts ranks again.
    """
    end, name = time.monotonic() + grace, out.with_name(f".{out.name}.{program}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(name, program, lambda: time.monotonic() < end))
        except Busy as error:
            raise Busy(f"--out {out}: {error}; end it first, or choose another --out") from error
        except (Unwritable, FileNotFoundError, NotADirectoryError) as error:
            why = error.strerror
            raise Refused(f"--out {out} cannot be written ({why}): make room or choose another") from error
        yield


def to_json(content: dict, indent: int = 2) -> str:
    return json.dumps(content, indent=indent)


# ---- command lines ------------------------------------------------------------------------------------


class Output(io.FileIO):
    """A program's output; that nobody reads on, behind `| head` or a `tee` that Ctrl-C ended, is no error."""

    def write(self, content: bytes) -> int | None:
        try:
            return super().write(content)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(content)


def let_readers_go() -> None:
    """Let a program end as it would, or save what it trained, where nobody reads what it says any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):  # not where a test, say, has put its own
            stream.flush()
            bytes_out = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(bytes_out, stream.encoding, stream.errors, **how))


def read_command_line(
    config: type,
    description: str | None,
    first: Sequence[str],
    args: Sequence[str] | None = None,
    prog: str | None = None,
) -> Any:
    """Read flags into a config; --help lays them out in two boxes, what people use first, then the rest."""
    import tyro

    let_readers_go()
    hints, docs = get_type_hints(config, include_extras=True), field_docs(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    boxes = {"often": first, "more": [name for name in fields if name not in first]}
    quiet = ("None", "''", "", "()")  # defaults that say nothing; the text says what happens then
    said = lambda default: "" if default in quiet else f"(default: {default})"  # noqa: E731

    def choice(names: tuple[str, ...]) -> object:
        """One of them, or None by default: tyro's own names None too, and all in random order."""
        return tyro.constructors.PrimitiveConstructorSpec(
            1, f"{{{','.join(names)}}}", lambda given: given[0], lambda x: x in (None, *names),
            lambda x: [str(x)], names,
        )  # fmt: skip

    def option(name: str) -> tuple:
        how = tyro.conf.arg(help=docs.get(name), help_behavior_hint=said)  # a group of options has none
        one, kind = fields[name], hints[name]
        made = dataclasses.field(default=one.default, default_factory=one.default_factory)
        if get_origin(kind) in (Union, UnionType) and get_origin(get_args(kind)[0]) is Literal:
            kind = Annotated[kind, choice(get_args(get_args(kind)[0]))]
        return name, Annotated[kind, how], made

    def box(name: str, names: Sequence[str]) -> tuple:
        return name, dataclasses.make_dataclass(name, map(option, names), frozen=True)

    filled = {name: names for name, names in boxes.items() if names}
    both = dataclasses.make_dataclass("both", [box(*pair) for pair in filled.items()], frozen=True)
    rank0 = os.environ.get("RANK", "0") == "0"
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    options = {"description": description, "console_outputs": rank0, "config": style}
    found = tyro.cli(both, prog=prog, args=args, **options)
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


@contextmanager
def told() -> Iterator[None]:
    """End the program in one line over what a person gave wrong, and what the system does not allow."""
    try:
        yield
    except (Refused, Unwritable, PermissionError) as error:
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
