"""The values that a boot can't wait for attrs to make: they are as attrs would have made them."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import FileShared, Memfd
from vm_memory._values import define, evolve, field, fields, frozen


def not_empty(_value: object, item: Any, found: object) -> None:
    """A rule for a field."""
    if found in ((), b""):
        raise TypeError(item.name)


@frozen
class Base:
    """What the others have in common."""

    kind: ClassVar[str] = "base"
    id: str = field(default="", kw_only=True)


@frozen
class Light(Base):
    """Of every sort of field one."""

    first: int
    second: Any = 2
    hidden: bytes = field(default=b"", repr=False)
    many: tuple[int, ...] = field(default=(), converter=tuple)
    owner: object = field(default=0, eq=False, kw_only=True, validator=not_empty)


@attrs.frozen
class ByAttrsBase:
    kind: ClassVar[str] = "base"
    id: str = attrs.field(default="", kw_only=True)


@attrs.frozen
class ByAttrs(ByAttrsBase):
    first: int
    second: Any = 2
    hidden: bytes = attrs.field(default=b"", repr=False)
    many: tuple[int, ...] = attrs.field(default=(), converter=tuple)
    owner: object = attrs.field(default=0, eq=False, kw_only=True, validator=not_empty)


@frozen(kw_only=True)
class Named:
    """Fields by name alone, and a rule."""

    low: int
    high: int = 5

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@define
class Slotted:
    """As the exits of a vCPU are."""

    __slots__ = ("data", "port")

    port: int
    data: bytes

    def __init__(self, port: int, data: bytes) -> None:
        self.port = port
        self.data = data


VALUES = st.one_of(st.integers(0, 3), st.just(()), st.binary(max_size=1))
NAMES = st.sampled_from(["first", "second", "hidden", "many", "id", "owner", "other"])
CALLS = st.tuples(st.lists(VALUES, max_size=5), st.dictionaries(NAMES, VALUES, max_size=4))


def made(cls: type, call: tuple[list[Any], dict[str, Any]]) -> Any:
    """An instance, or the error's class where there can be none."""
    try:
        return cls(*call[0], **call[1])
    except TypeError as error:
        return type(error)


@given(one=CALLS, other=CALLS)
def test_they_are_as_attrs_makes_them(
    one: tuple[list[Any], dict[str, Any]], other: tuple[list[Any], dict[str, Any]]
) -> None:
    """The same calls succeed, with the same text, equality, hash rule and dictionary."""
    ours = made(Light, one), made(Light, other)
    theirs = made(ByAttrs, one), made(ByAttrs, other)
    for light, heavy in zip(ours, theirs, strict=True):
        if isinstance(light, type) or isinstance(heavy, type):
            assert light is heavy
        else:
            assert repr(light) == repr(heavy).replace("ByAttrs", "Light")
            assert attrs.asdict(light) == attrs.asdict(heavy)
            assert pickle.loads(pickle.dumps(light)) == light
            assert evolve(light, first=9) == attrs.evolve(light, first=9)
            assert evolve(light, first=9).first == 9
    assert (ours[0] == ours[1]) == (theirs[0] == theirs[1])
    if ours[0] == ours[1] and not isinstance(ours[0], type):
        assert hash(ours[0]) == hash(ours[1])


def test_attrs_and_inspect_know_them() -> None:
    """Fields in order, types, signature, and patterns by position."""
    assert all(map(attrs.has, (Light, Base, Named, Slotted)))
    names = ["id", "first", "second", "hidden", "many", "owner"]
    assert [item.name for item in attrs.fields(Light)] == names
    assert [item.name for item in fields(Light)] == [item.name for item in fields(ByAttrs)]
    assert [item.required for item in fields(Light)] == [item.required for item in fields(ByAttrs)]
    assert [item.type for item in fields(Light)] == [item.type for item in fields(ByAttrs)]
    assert inspect.signature(Light) == inspect.signature(ByAttrs)
    match Light(1, 2):
        case Light(1, second):
            assert second == 2


def test_attrs_can_go_on_from_them() -> None:
    """A subclass that attrs makes has the fields of both, and its own signature."""

    @attrs.frozen
    class More(Light):
        last: str = "z"

    more = More(1, last="y", id="name")
    text = "More(id='name', first=1, second=2, many=(), owner=0, last='y')"
    assert repr(more).endswith(text)
    assert attrs.evolve(more, first=3) == More(3, last="y", id="name")
    assert list(inspect.signature(More).parameters)[-3:] == ["last", "id", "owner"]
    assert [item.name for item in fields(More)][-1] == "last"


def test_they_do_not_change() -> None:
    """Setting and deleting are errors of attrs; what has no place for a field refuses it."""
    light = Light(1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        light.first = 2  # type: ignore[misc]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        del light.first
    with pytest.raises(AttributeError):
        Slotted(1, b"").other = 2  # type: ignore[attr-defined]


def test_mistakes_are_named() -> None:
    """Fields that are missing, unknown, given twice or by position where they have a name only."""
    for call, words in (
        (lambda: Light(), "needs first"),  # type: ignore[call-arg]
        (lambda: Light(1, third=3), "no field 'third'"),  # type: ignore[call-arg]
        (lambda: Light(1, first=1), "twice"),  # type: ignore[misc]
        (lambda: Light(*range(5)), "by position"),
        (lambda: Named(1), "by position"),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(ValueError, match="low is above"):
        Named(low=6)


def test_an_init_of_its_own_is_kept() -> None:
    """Such a class compares and prints by its fields, and has no hash, as attrs.define has it."""
    one = Slotted(1, b"a")
    assert one == Slotted(1, b"a") != Slotted(2, b"a")
    assert repr(one) == "Slotted(port=1, data=b'a')"
    with pytest.raises(TypeError, match="hash"):
        hash(one)
    match one:
        case Slotted(port, data):
            assert (port, data) == (1, b"a")


def test_a_backing_needs_no_attrs() -> None:
    """What memory is made of can be said in a process that has not imported attrs."""
    code = "import sys; from vm_memory import Memfd; print(Memfd('x'), 'attr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{Memfd('x')} False\n"
    assert attrs.asdict(FileShared("f")) == {"file": "f", "offset": 0}
