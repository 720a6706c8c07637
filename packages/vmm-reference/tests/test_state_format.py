"""The written form of states: everything comes back as it was, and nothing else is taken."""

import enum
import importlib
import json
import typing
from typing import Any

import attrs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vmm_reference.devices.states import StateError
from vmm_reference.state.format import FormatError, decode, encode

MODULES = ("kvm_ioctls.state", "virtio_queue.state", "vmm_reference.devices.states")


def state_classes() -> list[type]:
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        found += [getattr(module, n) for n in module.__all__]
    return [kind for kind in found if isinstance(kind, type) and attrs.has(kind)]


NUMBERS = st.integers(0, 1) | st.integers(0, 255) | st.integers(-(1 << 63), (1 << 64) - 1)
BYTES = st.sampled_from((0, 1, 16, 128)).flatmap(lambda n: st.binary(min_size=n, max_size=n))


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a declared type, states included."""
    plain: dict[object, st.SearchStrategy[Any]] = {
        int: NUMBERS, bool: st.booleans(), str: st.text(max_size=8), bytes: BYTES,
        type(None): st.none(),
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and items[-1] is ...:
        return st.lists(values(items[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, items))
    if origin is dict:
        return st.dictionaries(*map(values, items), max_size=3)
    if origin is not None:
        return st.one_of(*map(values, items))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    return states(kind)


def states(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    fields = {f.name: values(hints[f.name]) for f in attrs.fields(kind) if f.name != "version"}
    return st.fixed_dictionaries(fields).map(lambda given: _make(kind, given))


def _make(kind: type, given: dict[str, object]) -> object:
    """A value of the class, which may narrow its fields by validators of its own."""
    try:
        return kind(**given)
    except StateError as error:
        name = error.field.rpartition(".")[2]
        default = _legal(kind, name, given)
        if given[name] == default and type(given[name]) is type(default):
            assume(False)
        return _make(kind, {**given, name: default})


def _legal(kind: type, name: str, given: dict[str, object]) -> object:
    """A value of a field that its class takes; lists have one item for each port or pair."""
    legal: dict[str, object] = {
        "cmos": bytes(128), "sectors": 1, "pairs": 1, "active_pairs": 1, "ports": 1,
        "mac": bytes(6), "permanent_mac": bytes(6), "number": 1, "types": bytes(256),
    }  # fmt: skip
    if name in legal:
        return legal[name]
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) is tuple:
        count = given.get("pairs" if name == "waiting" else "ports", 0)
        return (typing.get_args(hint)[0](),) * (count if isinstance(count, int) else 0)
    return b"" if hint is bytes else 0


CLASSES = state_classes()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_every_state_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    """Of every state class of every package; and equal states give equal text."""
    state = data.draw(states(kind))
    text = encode(state)
    again: object = decode(text, kind, "part")
    assert again == state
    assert type(again) is kind
    assert encode(again) == text


def test_all_packages_states_are_covered() -> None:
    """The classes above are those that there are: a package without any would go unnoticed."""
    homes = {kind.__module__.partition(".")[0] for kind in CLASSES}
    assert homes == {"kvm_ioctls", "virtio_queue", "vmm_reference"}
    assert len(CLASSES) > 25


OTHERS: st.SearchStrategy[object] = st.sampled_from(
    (None, True, 1.5, -1.0, "x", "AA", [], [[]], {}, {"class": "Nobody"})
)


def places(plain: Any, path: str = "part") -> list[tuple[Any, Any, str]]:
    """Every place in a JSON value: what holds it, its key there and its path."""
    found = []
    items: Any = ()
    if isinstance(plain, dict):
        items = [(key, f"{path}.{key}") for key in plain]
    elif isinstance(plain, list):
        items = [(n, f"{path}[{n}]") for n in range(len(plain))]
    for key, name in items:
        found += [(plain, key, name), *places(plain[key], name)]
    return found


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data(), other=OTHERS)
def test_a_value_of_another_type_is_refused_by_name(
    kind: type, data: st.DataObject, other: object
) -> None:
    """Whatever field it is, it is refused with its path, or the value is one that it may have."""
    plain = json.loads(encode(data.draw(states(kind))))
    where = places(plain)
    holder, key, path = data.draw(st.sampled_from(where))
    assume(type(holder[key]) is not type(other))
    holder[key] = other
    text = json.dumps(plain).encode()
    try:
        found = json.loads(encode(decode(text, kind, "part")))
    except FormatError as error:
        found = error.field
    assert found == plain or path.startswith(str(found)) or str(found).startswith(path)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_a_field_more_or_less_is_refused_by_name(kind: type, data: st.DataObject) -> None:
    """No field is guessed in a state of this version, and none is passed over."""
    plain = json.loads(encode(data.draw(states(kind))))
    name = data.draw(st.sampled_from(sorted(plain)))
    less = {key: value for key, value in plain.items() if key != name}
    with pytest.raises(FormatError) as caught:
        decode(json.dumps(less).encode(), kind, "part")
    assert caught.value.field == f"part.{name}"
    with pytest.raises(FormatError) as caught:
        decode(json.dumps({**plain, "extra": 0}).encode(), kind, "part")
    assert caught.value.field == "part.extra"


@attrs.frozen
class First:
    size: int
    version: int = 1


@attrs.frozen
class Second:
    size: int
    ready: bool = True
    version: int = 2


@attrs.frozen
class Third:
    pages: int
    ready: bool = True
    version: int = 3

    @classmethod
    def upgrade(cls, version: int, fields: dict[str, Any]) -> dict[str, Any]:
        """Sizes were bytes before."""
        return {"pages": fields.pop("size") // 4096} | fields


@given(size=st.integers(0, 1 << 40), ready=st.booleans())
def test_a_newer_release_reads_an_older_ones_states(size: int, ready: bool) -> None:
    """New fields get what they meant before; changed ones are upgraded, over several versions."""
    assert decode(encode(First(size)), Second, "x") == Second(size, True)
    assert decode(encode(First(size)), Third, "x") == Third(size // 4096, True)
    assert decode(encode(Second(size, ready)), Third, "x") == Third(size // 4096, ready)


def test_an_older_release_refuses_a_newer_ones_states() -> None:
    """It can't know what the fields mean."""
    with pytest.raises(FormatError, match="newer release") as caught:
        decode(encode(Second(1)), First, "x")
    assert caught.value.field == "x.version"


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_a_version_is_a_positive_number(version: object) -> None:
    """Anything else is refused before the fields are looked at."""
    with pytest.raises(FormatError) as caught:
        decode(json.dumps({"size": 1, "version": version}).encode(), First, "x")
    assert caught.value.field == "x.version"


def test_an_upgrade_that_stumbles_is_a_refusal() -> None:
    """What an old state lacks does not become an exception of another kind."""
    with pytest.raises(FormatError, match="can't be read as version 1"):
        decode(b'{"version": 1}', Third, "x")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff", b"null", b"[]", b"1", b'"x"', b"{", b'{"size": NaN, "version": 1}',
        b'{"size": Infinity, "version": 1}', b'{"size": 1.0, "version": 1}',
        b'{"size": true, "version": 1}', b'{"size": 1, "size": 1, "version": 1}',
        b'{"size": 1, "version": 1} ]', b'{"size": 1, "version": 1, "version": 1}',
        b"[" * 100_000, b'{"size":' * 100_000, b'{"size": ' + b"9" * 5000 + b', "version": 1}',
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_state_is_refused(text: bytes) -> None:
    """Neither a crash nor another exception."""
    with pytest.raises(FormatError):
        decode(text, First, "x")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    """Only its own exception comes out."""
    with pytest.raises(FormatError):
        decode(data, Second, "x")


@attrs.frozen
class Mistyped:
    size: float = 0.0


def test_what_cannot_be_written_is_told_at_once() -> None:
    """A field of a type that has no form, and a value of another type than declared."""
    with pytest.raises(TypeError, match="no type that a state's field may have"):
        encode(Mistyped())
    with pytest.raises(TypeError, match=r"First\.size"):
        encode(First("1"))  # type: ignore[arg-type]
