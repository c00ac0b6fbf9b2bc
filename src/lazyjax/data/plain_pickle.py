"""A reader of pickles that hold plain containers, texts, numbers and arrays. It runs nothing, and makes no object.

A pickle is a program for a machine with a stack. Python's own machine calls what a pickle names, and NumPy's dtypes
take what a pickle says about memory on trust; this one knows the opcodes of the published files of CIFAR-10, and what
their four names stand for.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn


@dataclasses.dataclass
class PlainArray:
    """An array as a pickle has it, which says in two steps that it is one, and which.

    Attributes:
        dtype: As NumPy names it, such as "u1"; empty as long as nothing was said.
        shape: Lengths of its axes.
        fortran: Whether the first axis runs first.
        content: Its bytes.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    fortran: bool = False
    content: bytes = b""


@dataclasses.dataclass(frozen=True)
class _Dtype:
    name: str


@dataclasses.dataclass(frozen=True)
class _Name:
    module: str
    name: str


RECONSTRUCT = tuple(_Name(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core"))
"""NumPy's own function that begins an array, whose module differs between versions."""
NDARRAY, DTYPE, ENCODE = _Name("numpy", "ndarray"), _Name("numpy", "dtype"), _Name("_codecs", "encode")


def load_plain(raw: bytes) -> Any:
    """Return what a pickle holds: dicts with texts for keys, lists, tuples, texts, numbers, and `PlainArray`.

    Raises:
        ValueError: it is no pickle, or holds anything else; nothing of it was run.
    """
    machine = _Machine(len(raw))
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "STOP":
                return machine.pop()
            if opcode.name not in OPCODES:
                _refuse(f"it has the opcode {opcode.name}")
            OPCODES[opcode.name](machine, argument)
    except (LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        msg = f"{type(error).__name__}: {error}"
        raise ValueError(msg) from error
    msg = "it does not end"
    raise ValueError(msg)


class _Machine:
    """The stack, what is below the marks, and the memory of a pickle."""

    def __init__(self, size: int):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.left = size

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the last value from the stack."""
        return self.stack.pop()

    def mark(self, _: Any) -> None:
        """Begin a new stack above this one."""
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """Take what is above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, number: int) -> tuple[Any, ...]:
        """Take the last few values from the stack."""
        return tuple(reversed([self.pop() for _ in range(number)]))

    def remember(self, number: int | None) -> None:
        """Keep the last value under a number, the next one if none is given."""
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        """Append to the list on the stack."""
        if not isinstance(self.stack[-1], list):
            _refuse("it appends to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set items of the dictionary on the stack: keys and values in turn."""
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            _refuse("it sets items of what is no dictionary")
        # Other keys could be tuples in tuples, too deep to be hashed.
        if not all(isinstance(key, str | bytes) for key in items[::2]):
            _refuse("it has a dictionary with other keys than texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        """Put one of the four names on the stack."""
        found = _Name(str(module)[:100], str(name)[:100])
        if found not in (*RECONSTRUCT, NDARRAY, DTYPE, ENCODE):
            _refuse(f"it asks for {found.module}.{found.name}, which was not run")
        self.push(found)

    def call(self, _: Any) -> None:
        """Do what a name stands for, without calling it."""
        function, arguments = self.last(2)
        if function == ENCODE:
            self.push(self.encode(*arguments))
        elif function == DTYPE:
            self.push(_Dtype(_text(arguments[0])))
        elif function in RECONSTRUCT and arguments[0] == NDARRAY:
            self.push(PlainArray())
        else:
            _refuse("it calls what is no function")

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Return the bytes that Python 3 writes as a text, for Python 2 to read."""
        if not isinstance(text, str):
            _refuse("it encodes what is no text")
        if encoding != "latin1":
            _refuse(f"it asks for the encoding {encoding!r}")
        self.left -= len(text)
        if self.left < 0:
            _refuse("it asks for more bytes than it has")
        return text.encode("latin1")

    def build(self, _: Any) -> None:
        """Tell an array shape, dtype and bytes."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            return  # byte order and more, which bytes have none of
        if not isinstance(target, PlainArray):
            _refuse("it gives a state to what is no array")
        _, shape, dtype, fortran, content = state
        fits = isinstance(shape, tuple) and all(type(size) is int for size in shape) and isinstance(dtype, _Dtype)
        if not fits:
            _refuse("it has an array without shape or dtype")
        target.dtype, target.shape, target.fortran = dtype.name, shape, bool(fortran)
        target.content = content if isinstance(content, bytes) else b""  # an array of objects has a list here


def _text(value: Any) -> str:
    """Return a text, which Python 2 has written as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "INT", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda m, text: m.push(text.encode("latin1"))),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda m, number: m.remember(number)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, number: m.push(m.memo[number])),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(list(m.last(2))),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "GLOBAL": lambda m, both: m.name(*both.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m.last(2)),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
