"""A pickle machine for data alone: it imports, calls and runs nothing.

A pickle is a program for a stack machine; the standard reader's machine can import any name and
call it. This one has 45 of its operations, those that build numbers, text, bytes, lists,
dictionaries, sets and tuples, and the four that name code: GLOBAL and STACK_GLOBAL push an inert
record, if the name is in the `Vocabulary`, and REDUCE and NEWOBJ ask the vocabulary for what the
record stands for. Nothing is ever imported, called or executed on the file's behalf.

Operations: pickletools in the standard library lists them with their arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

from fewstep.safe_pickle.limits import Budget, UnsafeSnapshotError, require
from fewstep.safe_pickle.records import Blob, Global

_MARK = object()


class Vocabulary(Protocol):
    """The meaning of names; each method raises UnsafeSnapshotError for unknown ones."""

    def name(self, record: Global) -> None:
        """Accept or refuse a name."""

    def call(self, record: Global, args: tuple[Any, ...]) -> Any:
        """The data that calling the name would stand for."""

    def new(self, record: Global, args: tuple[Any, ...]) -> Any:
        """The empty object of a class."""

    def fill(self, target: Any, state: Any) -> None:
        """Give an object its contents."""

    def persistent(self, pid: Any) -> Any:
        """The data of an identifier from outside the pickle."""


class Machine:
    """Runs one pickle that starts at `position` of `data`; afterwards `position` is its end."""

    def __init__(self, data: memoryview, position: int, words: Vocabulary, budget: Budget) -> None:
        self.data = data
        self.position = position
        self.words = words
        self.budget = budget
        self.limits = budget.limits
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes; UnsafeSnapshotError for anything but data."""
        while True:
            self.budget.spend("operations", 1, self.limits.operations)
            code = self.take(1)[0]
            if code == 0x2E:
                result = self.pop()
                require(not self.stack, "the pickle leaves more than one object")
                return result
            operation = _OPERATIONS.get(code)
            if operation is None:
                at = self.position - 1
                raise UnsafeSnapshotError(f"operation 0x{code:02x} at byte {at} is not allowed")
            operation(self)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.position + count
        require(end <= len(self.data), f"the file ends within {count} bytes at {self.position}")
        view = self.data[self.position : end]
        self.position = end
        return view

    def number(self, layout: str) -> Any:
        """The next number, of a struct layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to the next newline."""
        view = bytes(self.data[self.position : self.position + self.limits.name_length])
        text, newline, _ = view.partition(b"\n")
        require(bool(newline) and text.isascii(), "a name does not end, or is not ASCII")
        self.position += len(text) + 1
        return text.decode("ascii")

    def text(self, count: int) -> str:
        """UTF-8 text of `count` bytes."""
        data = bytes(self.take(count))
        if count > self.limits.long_text:
            require(not data.translate(None, bytes(range(0xC4))), f"text of {count} bytes")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise UnsafeSnapshotError("text is not UTF-8") from None
        bound = self.limits.text_bytes + self.budget.file_bytes
        self.budget.spend("bytes of text", text.__sizeof__(), bound)
        return text

    def push(self, value: Any) -> None:
        """Push a value on the stack."""
        self.stack.append(value)

    def container(self, value: Any) -> None:
        """Push a list, tuple, dictionary or set, or a view of the file."""
        self.budget.spend("containers", 1, self.limits.containers)
        self.stack.append(value)

    def top(self) -> Any:
        """The value on top of the stack; UnsafeSnapshotError where there is none."""
        require(bool(self.stack) and self.stack[-1] is not _MARK, "the stack is empty")
        return self.stack[-1]

    def pop(self) -> Any:
        """Remove the value on top of the stack and return it."""
        value = self.top()
        del self.stack[-1]
        return value

    def since_mark(self) -> list[Any]:
        """Pop everything down to the last mark, and the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise UnsafeSnapshotError("there is no mark on the stack")

    def put(self, index: int) -> None:
        """Store the value on top of the stack in the memo."""
        require(len(self.memo) < self.limits.memo, "the memo is full")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        """Push a value of the memo."""
        require(index in self.memo, f"nothing was stored under {index}")
        self.push(self.memo[index])

    def target(self, kind: type) -> Any:
        """The container on top of the stack, of exactly this kind."""
        value = self.top()
        require(type(value) is kind, f"items for a {kind.__name__} have none to go to")
        return value

    def items(self, values: list[Any]) -> None:
        """Put keys and values into the dictionary on top."""
        target = self.target(dict)
        require(len(values) % 2 == 0, "a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key_of(key)] = value

    def named(self, module: Any, name: Any) -> None:
        """Push a record of a name, if the vocabulary allows it."""
        require(type(module) is str and type(name) is str, "a name is not text")
        record = Global(module, name)
        self.words.name(record)
        self.push(record)

    def made(self, make: Callable[[Global, tuple[Any, ...]], Any]) -> None:
        """Replace a record and its arguments by what the vocabulary makes: REDUCE and NEWOBJ."""
        args, record = self.pop(), self.pop()
        require(type(record) is Global and type(args) is tuple, "a call of something unnamed")
        self.container(make(record, args))


def key_of(key: Any) -> Any:
    """A dictionary key, which must be text or a small value.

    Tuples could hash for ever, large integers collide by design.
    """
    small = type(key) is int and abs(key) < 1 << 31
    require(small or type(key) in (str, bool, type(None)), "a key is neither text nor small")
    return key


def _protocol(m: Machine) -> None:
    require(2 <= m.number("<B") <= 5, "the pickle protocol is not 2 to 5")


def _integer(m: Machine) -> None:
    count = m.number("<B")
    require(count <= m.limits.integer_bytes, "an integer is too long")
    m.push(int.from_bytes(m.take(count), "little", signed=True))


def _tuple(count: int) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        values = [m.pop() for _ in range(count)]
        m.container(tuple(reversed(values)))

    return operation


def _append(m: Machine) -> None:
    value = m.pop()
    m.target(list).append(value)


def _extend(m: Machine) -> None:
    values = m.since_mark()
    m.target(list).extend(values)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.items([key, value])


def _add_items(m: Machine) -> None:
    values = [key_of(value) for value in m.since_mark()]
    m.target(set).update(values)


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.named(module, name)


def _build(m: Machine) -> None:
    state = m.pop()
    m.words.fill(m.top(), state)


def _pop(m: Machine) -> None:
    require(bool(m.stack), "the stack is empty")
    del m.stack[-1]


def _blob(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.container(Blob(m.take(m.number(layout))))


def _text(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.text(m.number(layout)))


def _number(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.number(layout))


_OPERATIONS: dict[int, Callable[[Machine], Any]] = {
    0x80: _protocol,
    0x95: lambda m: m.take(8),  # FRAME: its length is advice
    0x28: lambda m: m.push(_MARK),
    0x30: _pop,
    0x31: lambda m: m.since_mark(),
    0x32: lambda m: m.push(m.top()),
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x4A: _number("<i"),
    0x4B: _number("<B"),
    0x4D: _number("<H"),
    0x8A: _integer,
    0x47: _number(">d"),
    0x8C: _text("<B"),
    0x58: _text("<I"),
    0x8D: _text("<Q"),
    0x43: _blob("<B"),
    0x42: _blob("<I"),
    0x8E: _blob("<Q"),
    0x96: _blob("<Q"),
    0x7D: lambda m: m.container({}),
    0x5D: lambda m: m.container([]),
    0x29: lambda m: m.container(()),
    0x8F: lambda m: m.container(set()),
    0x74: lambda m: m.container(tuple(m.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    0x61: _append,
    0x65: _extend,
    0x73: _set_item,
    0x75: lambda m: m.items(m.since_mark()),
    0x90: _add_items,
    0x71: lambda m: m.put(m.number("<B")),
    0x72: lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    0x68: lambda m: m.get(m.number("<B")),
    0x6A: lambda m: m.get(m.number("<I")),
    0x63: lambda m: m.named(m.line(), m.line()),
    0x93: _stack_global,
    0x52: lambda m: m.made(m.words.call),
    0x81: lambda m: m.made(m.words.new),
    0x62: _build,
    0x51: lambda m: m.push(m.words.persistent(m.pop())),
}
