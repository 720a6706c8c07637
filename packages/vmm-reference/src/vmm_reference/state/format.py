"""One written form for every state: JSON with named fields, and a reader that believes nothing.

A state is a frozen attrs class whose fields are whole numbers, true or false, text, bytes,
enumerations, tuples, other states, or one of several of these. `encode` writes one, `decode` reads
it back as exactly the class that the caller expects; what is unknown, missing, doubled or of
another type is refused with the path of the field. So a state needs no code of its own to be
written, and no code of its own to be safe to read.

How a state may change from one release to the next:

- A new field gets a default that means what the releases before did, and `version` counts up. An
  older state, which lacks the field, is read with the default.
- A field that goes, or changes its meaning, needs a class method `upgrade(version, fields)`: it
  gets the version that was written and the fields as plain JSON values, and returns those of the
  class's own version.
- A state with a higher version than its class knows comes from a newer release: it is refused.

Bytes are written as hexadecimal text. A state that is one of several classes carries its class's
name as `class`, which no field can be called.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from vmm_reference.errors import RuleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "MAX_SIZE",
    "FormatError",
    "decode",
    "encode",
    "encode_fields",
    "fields",
    "pack",
    "pack_parts",
    "parse",
    "prepare",
    "state",
]

MAX_SIZE = 64 << 20
"""Bytes that a written state may have."""

T = TypeVar("T")


class FormatError(RuleError):
    """Saved content that is unknown, incomplete or corrupt: nothing was made of it.

    Attributes:
        field: where: the part's name and the path in it, such as `vcpu0.sregs.cr0`.
        value: what is there, shortened.
        rule: what must be there.
    """

    def within(self, outer: str) -> None:
        """The field is one of `outer`."""
        self.field = outer + self.field
        self.args = (self.field, self.value, self.rule)

    def __str__(self) -> str:
        text = repr(self.value)
        return f"{self.field}: {text if len(text) <= 80 else text[:77] + '...'} {self.rule}"


def encode(state: object) -> bytes:
    """A state as text, one field a line; equal states give equal text.

    Example:
        >>> from kvm_ioctls.state import Xcrs
        >>> print(encode(Xcrs()).decode(), end="")
        {
         "xcrs": [[0, 1]],
         "flags": 0,
         "version": 1
        }

    Raises:
        TypeError: a field's declared type is none that can be written, or its value is of another.
    """
    plain = _form(type(state)).write(state)
    # One line a field of the outermost state and of the states in it; lists of numbers stay whole.
    return (_text(plain, 0) + "\n").encode()


def pack(state: object) -> bytes:
    """A state for `decode` alone, without the lines that people read.

    Raises:
        TypeError: as for `encode`.
    """
    return json.dumps(_form(type(state)).write(state)).encode()


def pack_parts(parts: Iterable[tuple[str, object]]) -> bytes:
    """States by name in one piece; `parse` and `fields` give it back, and `state` each of them.

    Raises:
        TypeError: as for `encode`.
    """
    return json.dumps({name: _form(type(part)).write(part) for name, part in parts}).encode()


def encode_fields(plain: dict[str, Any]) -> bytes:
    """Fields that are plain JSON values, in the same form; `fields` reads them back."""
    return (_text(plain, 0) + "\n").encode()


def decode(data: bytes, kind: type[T], name: str) -> T:
    """The state that was written.

    Args:
        data: what `encode` gave, from a place that is not trusted.
        kind: the class that it must be.
        name: what to call it in errors.

    Raises:
        FormatError: it is anything else. Validators of the class itself count as well.
    """
    return state(parse(data, name), kind, name)


def state(plain: object, kind: type[T], name: str) -> T:
    """The state in what `parse` gave; arguments and errors as for `decode`."""
    try:
        value: T = _form(kind).read(plain)
    except FormatError as error:
        error.within(name)
        raise
    return value


def prepare(kind: type) -> None:
    """Learn how states of a class are read, before the first of them is."""
    form = _form(kind)
    if isinstance(form, _State):
        form._known()


def fields(plain: object, name: str) -> dict[str, Any]:
    """What `parse` gave, as the fields of a state, for who checks them elsewhere.

    Raises:
        FormatError: these are no fields.
    """
    if not isinstance(plain, dict):
        raise FormatError(name, plain, "must be fields")
    return plain


def parse(data: bytes, name: str) -> object:
    """A written state as plain JSON values; nothing is known yet of what they mean.

    Raises:
        FormatError: it is no JSON of the form that `encode` gives.
    """
    if len(data) > MAX_SIZE:
        raise FormatError(name, len(data), f"bytes are too many; at most {MAX_SIZE}")
    try:
        plain: object = json.loads(
            data.decode(),
            object_pairs_hook=partial(_object, name),
            parse_constant=lambda word: _refuse_word(word, name),
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(name, data[:40], f"is no JSON: {error}") from None
    return plain


def _object(name: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise FormatError(name, twice, "is there twice")
    return found


def _refuse_word(word: str, name: str) -> object:
    raise FormatError(name, word, "is no value of a state")


def _text(plain: object, depth: int) -> str:
    """JSON with a line for each field, and one for each state in a list."""
    inner = "\n" + " " * (depth + 1)
    if isinstance(plain, dict) and plain:
        rows = [f"{json.dumps(key)}: {_text(value, depth + 1)}" for key, value in plain.items()]
        return "{" + inner + f",{inner}".join(rows) + "\n" + " " * depth + "}"
    if isinstance(plain, list) and any(isinstance(item, dict) for item in plain):
        rows = [json.dumps(item) for item in plain]
        return "[" + inner + f",{inner}".join(rows) + "\n" + " " * depth + "]"
    return json.dumps(plain)


class _Form:
    """How values of one declared type are written and read. Both check.

    An error names the field from the value on; who reads what holds the value adds where that is.
    """

    __slots__ = ("kinds", "plain", "read", "write")

    def __init__(
        self,
        kinds: tuple[type, ...],
        write: Callable[[Any], object],
        read: Callable[[Any], Any],
        plain: type | None = None,
    ) -> None:
        self.kinds = kinds  # of JSON, by which one of several forms is told
        # The one type whose values are written and read as they are, without `write` and `read`:
        # a guest may stand still meanwhile.
        self.plain = plain
        self.write = write
        self.read = read


def _exactly(kind: type, words: str) -> _Form:
    def write(value: object) -> object:
        if type(value) is not kind:
            raise TypeError(f"{value!r} is not {words}")
        return value

    def read(plain: object) -> object:
        if type(plain) is not kind:
            raise FormatError("", plain, f"must be {words}")
        return plain

    return _Form((kind,), write, read, kind)


def _write_bytes(value: object) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{value!r} is not bytes")
    return value.hex()


def _read_bytes(plain: object) -> bytes:
    if isinstance(plain, str):
        try:
            value = bytes.fromhex(plain)
        except ValueError:
            pass
        else:
            if value.hex() == plain:  # fromhex takes capitals and spaces, we do not
                return value
    raise FormatError("", plain, "must be bytes as hexadecimal text in small letters")


_FORMS: dict[object, _Form] = {
    int: _exactly(int, "a whole number"),
    bool: _exactly(bool, "true or false"),
    str: _exactly(str, "text"),
    types.NoneType: _exactly(types.NoneType, "null"),
    bytes: _Form((str,), _write_bytes, _read_bytes),
}


def _form(kind: Any) -> _Form:
    form = _FORMS.get(kind)
    if form is None:
        form = _FORMS[kind] = _make(kind)
    return form


def _make(kind: Any) -> _Form:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _tuple(typing.get_args(kind))
    if origin is dict:
        return _mapping(*typing.get_args(kind))
    if origin is typing.Union or origin is types.UnionType:
        return _union(typing.get_args(kind))
    if isinstance(kind, type) and attrs.has(kind):
        return _State(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _enumeration(kind)
    raise TypeError(f"{kind!r} is no type that a state's field may have")


def _tuple(items: tuple[Any, ...]) -> _Form:
    """Any number of one type (`tuple[int, ...]`), or one of each that is named."""
    each: Iterable[_Form]
    if len(items) == 2 and items[1] is ...:
        each, count = repeat(_form(items[0])), None
        kinds = {_form(items[0]).plain}
    else:
        each, count = [_form(item) for item in items], len(items)
        kinds = {form.plain for form in each}
    alike = len(kinds) == 1 and None not in kinds  # all are plain, of one type

    def write(value: object) -> list[object]:
        if not isinstance(value, tuple) or (count is not None and len(value) != count):
            raise TypeError(f"{value!r} is not a tuple of the declared length")
        if alike and {*map(type, value)} <= kinds:
            return list(value)
        return [form.write(item) for form, item in zip(each, value, strict=False)]

    def read(plain: object) -> tuple[object, ...]:
        if not isinstance(plain, list):
            raise FormatError("", plain, "must be a list")
        if count is not None and len(plain) != count:
            raise FormatError("", plain, f"must have {count} items")
        if alike and {*map(type, plain)} <= kinds:
            return tuple(plain)
        found: list[object] = []
        try:
            for form, item in zip(each, plain, strict=False):
                found.append(form.read(item))
        except FormatError as error:
            error.within(f"[{len(found)}]")
            raise
        return tuple(found)

    return _Form((list,), write, read)


def _mapping(key: Any, item: Any) -> _Form:
    """A dict becomes a list of pairs: JSON's own keys are text only, and may be doubled."""
    pairs = _form(tuple[tuple[key, item], ...])

    def write(value: object) -> object:
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is not a dict")
        return pairs.write(tuple(value.items()))

    def read(plain: object) -> dict[object, object]:
        rows = pairs.read(plain)
        found = dict(rows)
        if len(found) != len(rows):
            raise FormatError("", plain, "must not have a key twice")
        return found

    return _Form((list,), write, read)


def _enumeration(kind: type[enum.Enum]) -> _Form:
    by_name = kind.__members__

    def write(value: object) -> str:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is not a {kind.__name__}")
        return value.name

    def read(plain: object) -> enum.Enum:
        if not isinstance(plain, str) or plain not in by_name:
            raise FormatError("", plain, f"must be one of {', '.join(by_name)}")
        return by_name[plain]

    return _Form((str,), write, read)


def _union(members: tuple[Any, ...]) -> _Form:
    """One of several types: told by the JSON type, states by their class's name."""
    forms = [_form(member) for member in members]
    states = {form.kind.__name__: form for form in forms if isinstance(form, _State)}
    if len(states) == 1:
        states = {}  # nothing to tell apart
    plains: dict[type, _Form] = {}
    for form in forms:
        if isinstance(form, _State) and states:
            continue
        for kind in form.kinds:
            if kind in plains:
                raise TypeError(f"{members!r} can't be told apart when they are read")
            plains[kind] = form

    def write(value: object) -> object:
        state = states.get(type(value).__name__)
        if state is not None:
            written = state.write(value)
            assert isinstance(written, dict)
            return {"class": type(value).__name__} | written
        for form in plains.values():
            try:
                return form.write(value)
            except TypeError:
                continue
        raise TypeError(f"{value!r} is none of {members!r}")

    def read(plain: object) -> object:
        if states and isinstance(plain, dict):
            name = plain.get("class")
            state = states.get(name) if isinstance(name, str) else None
            if state is None:
                raise FormatError(".class", name, f"must be one of {', '.join(states)}")
            return state.read({key: plain[key] for key in plain if key != "class"})
        form = plains.get(type(plain))
        if form is None:
            known = ", ".join(kind.__name__ for kind in plains)
            raise FormatError("", plain, f"must be one of {known}")
        return form.read(plain)

    kinds = tuple(plains) + ((dict,) if states else ())
    return _Form(kinds, write, read)


class _State(_Form):
    """An attrs class; its fields' forms are looked up when first needed."""

    __slots__ = ("_fields", "_upgrade", "_version", "kind")

    def __init__(self, kind: type) -> None:
        super().__init__((dict,), self._write, self._read)
        self.kind = kind
        self._fields: list[tuple[str, str, _Form, bool, type | None]] | None = None
        self._version: int | None = None
        self._upgrade: Callable[[int, dict[str, object]], dict[str, object]] | None
        self._upgrade = getattr(kind, "upgrade", None)

    def _known(self) -> list[tuple[str, str, _Form, bool, type | None]]:
        """Name, argument of the constructor, form, whether it must be there, the plain type."""
        if self._fields is None:
            hints = typing.get_type_hints(self.kind)
            fields = [field for field in attrs.fields(self.kind) if field.init]
            self._fields = [
                (field.name, field.alias or field.name, form := _form(hints[field.name]),
                 field.default is attrs.NOTHING, form.plain)
                for field in fields
            ]  # fmt: skip
            default = {field.name: field.default for field in fields}.get("version")
            self._version = default if isinstance(default, int) else None
        return self._fields

    def _write(self, value: object) -> dict[str, object]:
        if type(value) is not self.kind:
            raise TypeError(f"{value!r} is not a {self.kind.__name__}")
        plain = {}
        for name, _, form, _, kind in self._known():
            item = getattr(value, name)
            try:
                plain[name] = item if type(item) is kind else form.write(item)
            except TypeError as error:
                raise TypeError(f"{self.kind.__name__}.{name}: {error}") from None
        return plain

    def _read(self, plain: object) -> object:
        fields = self._known()
        if not isinstance(plain, dict):
            raise FormatError("", plain, f"must be the fields of a {self.kind.__name__}")
        older = False
        if self._version is not None:
            plain, older = self._current(plain)
        arguments = {}
        for name, argument, form, needed, kind in fields:
            if name in plain:
                item = plain[name]
                try:
                    arguments[argument] = item if type(item) is kind else form.read(item)
                except FormatError as error:
                    error.within(f".{name}")
                    raise
            elif needed or not older:
                raise FormatError(f".{name}", None, "is missing")
        if len(arguments) != len(plain):
            names = {name for name, *_ in fields}
            unknown = next(key for key in plain if key not in names)
            raise FormatError(f".{unknown}", plain[unknown], "is not known here")
        try:
            return self.kind(**arguments)
        except (ValueError, TypeError, LookupError) as error:
            raise FormatError("", plain, f"can't be: {error}") from error

    def _current(self, plain: dict[str, object]) -> tuple[dict[str, object], bool]:
        """The fields in the class's own version, and whether they were older."""
        assert self._version is not None
        version = plain.get("version")
        if type(version) is not int or version < 1:
            raise FormatError(".version", version, "must be a whole number from 1")
        if version > self._version:
            rule = f"was written by a newer release; this one reads up to {self._version}"
            raise FormatError(".version", version, rule)
        if version == self._version:
            return plain, False
        if self._upgrade is not None:
            try:
                plain = self._upgrade(version, dict(plain))
            except (ValueError, TypeError, LookupError) as error:
                rule = f"can't be read as version {version}: {error}"
                raise FormatError("", plain, rule) from error
        return plain | {"version": self._version}, True
