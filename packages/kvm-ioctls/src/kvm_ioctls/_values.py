"""Values as attrs makes them, without what attrs costs a process that is to start a guest at once.

attrs reads and compiles source for each class, and brings half of the standard library along: in
an emulated machine that takes longer than a kernel needs to its first line. Classes that every
boot needs are made by this module instead. To the type checker they are attrs' own. To everybody
else they behave so, and where attrs or `inspect` ask for more (`attrs.fields`, `attrs.asdict`, a
subclass made by attrs, a signature), attrs gives the answer.

A class says what it is by annotations, which are text (`from __future__ import annotations`), by
defaults, `field` and `__attrs_post_init__`. Where it has an `__init__` of its own, that is kept.
kvm_ioctls has a copy of this file, since neither package depends on the other.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from attrs import define as define
    from attrs import evolve as evolve
    from attrs import field as field
    from attrs import frozen as frozen

__all__ = ["Field", "define", "evolve", "field", "fields", "frozen"]


class Field:
    """What is known of one field.

    Attributes:
        name: as in the class.
        type: the annotation.
        arguments: what `field` was called with.
    """

    __slots__ = ("arguments", "name", "type")

    def __init__(self, name: str, annotation: str, arguments: dict[str, object]) -> None:
        self.name = name
        self.type = annotation
        self.arguments = arguments

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return "default" not in self.arguments


def fields(cls: type) -> tuple[Field, ...]:
    """The fields of a class that this module or attrs has made, those of its bases first."""
    if "_fields" in cls.__dict__:
        found: tuple[Field, ...] = cls._fields  # type: ignore[attr-defined]
        return found
    import attrs

    return tuple(
        Field(item.name, str(item.type), {} if item.default is attrs.NOTHING else {"default": None})
        for item in attrs.fields(cls)
    )


if not TYPE_CHECKING:

    class _Arguments(dict):
        """What a class body has in the place of a default where it calls `field`."""

    def field(**arguments):
        """As `attrs.field`: converter, default, eq, kw_only, repr and validator."""
        return _Arguments(arguments)

    def evolve(value, /, **changes):
        """As `attrs.evolve`."""
        same = {item.name: getattr(value, item.name) for item in fields(type(value))}
        return type(value)(**(same | changes))

    def define(cls):
        """As `attrs.define`, of a class with `__slots__` and an `__init__` of its own."""
        _make(cls, False)
        cls.__hash__ = None
        return cls

    def frozen(cls=None, /, *, kw_only=False):
        """As `attrs.frozen`, with the fields in the instance's dictionary."""
        if cls is None:
            return lambda cls: frozen(cls, kw_only=kw_only)
        _make(cls, kw_only)
        cls.__init__ = _init(cls)
        cls.__setattr__ = cls.__delattr__ = _refuse
        cls.__signature__ = _ByAttrs(cls, _signature, inherited=False)
        return cls

    def _make(cls, kw_only):
        """What both have in common: the fields, comparison and representation."""
        known = {item.name: item for base in cls.__bases__ for item in getattr(base, "_fields", ())}
        slots = cls.__dict__.get("__slots__", ())
        for name, annotation in cls.__annotations__.items():
            if annotation.startswith("ClassVar"):
                continue
            arguments = _Arguments()
            if name in cls.__dict__ and name not in slots:
                given = cls.__dict__[name]
                arguments = given if type(given) is _Arguments else _Arguments(default=given)
                delattr(cls, name)
            if kw_only:
                arguments["kw_only"] = True
            known[name] = Field(name, annotation, arguments)
        cls._fields = tuple(known.values())
        cls.__match_args__ = tuple([n for n, f in known.items() if "kw_only" not in f.arguments])
        cls.__attrs_attrs__ = _ByAttrs(cls, lambda made: made.__attrs_attrs__)
        names = [name for name, item in known.items() if item.arguments.get("eq", True)]
        shown = [name for name, item in known.items() if item.arguments.get("repr", True)]

        def values(self):
            return tuple([getattr(self, name) for name in names])

        def equal(self, other):
            return values(self) == values(other) if type(other) is type(self) else NotImplemented

        def represent(self):
            pairs = ", ".join([f"{name}={getattr(self, name)!r}" for name in shown])
            return f"{type(self).__qualname__.rpartition('>.')[2]}({pairs})"

        cls.__eq__, cls.__hash__, cls.__repr__ = equal, lambda self: hash(values(self)), represent

    def _init(cls):
        """The `__init__` of a frozen class."""
        names = [item.name for item in cls._fields]
        positional = cls.__match_args__
        defaults = {f.name: f.arguments["default"] for f in cls._fields if not f.required}
        converters = [
            (item.name, item.arguments["converter"])
            for item in cls._fields
            if "converter" in item.arguments
        ]
        validators = [
            (item, item.arguments["validator"])
            for item in cls._fields
            if "validator" in item.arguments
        ]
        complete = hasattr(cls, "__attrs_post_init__")

        def init(self, *args, **kwargs):
            values = self.__dict__
            values.update(defaults)
            if args:
                values.update(zip(positional, args, strict=False))
            values.update(kwargs)
            if len(values) != len(names) or len(args) > len(positional) or kwargs:
                _check_arguments(type(self).__name__, names, positional, defaults, args, kwargs)
            for name, convert in converters:
                values[name] = convert(values[name])
            for item, check in validators:
                check(self, item, values[item.name])
            if complete:
                self.__attrs_post_init__()

        return init

    def _check_arguments(cls, names, positional, defaults, args, kwargs):
        """Raise TypeError unless these arguments give each field once."""
        if len(args) > len(positional):
            raise TypeError(f"{cls} takes {len(positional)} arguments by position, not {len(args)}")
        given = positional[: len(args)]
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{cls} has no field {name!r}; it has {', '.join(names)}")
            if name in given:
                raise TypeError(f"{cls} got {name!r} twice, by position and by name")
        missing = [n for n in names if not (n in given or n in kwargs or n in defaults)]
        if missing:
            raise TypeError(f"{cls} needs {', '.join(missing)}")

    def _refuse(self, name, value=None):
        """Set or delete a field of a frozen value."""
        from attrs.exceptions import FrozenInstanceError

        raise FrozenInstanceError

    class _ByAttrs:
        """Something about a class that attrs knows once it has made one alike, on first use."""

        def __init__(self, owner, answer, inherited=True):
            self._owner, self._answer, self._inherited = owner, answer, inherited
            self._known = None

        def __get__(self, instance, cls):
            if cls is not self._owner and not self._inherited:
                raise AttributeError(f"{cls.__name__} has one of its own")
            if self._known is None:
                self._known = self._answer(_by_attrs(self._owner))
            return self._known

    def _by_attrs(owner):
        """A class as attrs makes it."""
        import attrs

        own = owner.__annotations__
        body = {"__annotations__": own, "__module__": owner.__module__}
        for item in owner._fields:
            if item.name in own:
                body[item.name] = attrs.field(**item.arguments)
        body |= {name: owner.__dict__[name] for name in ("__doc__",) if name in owner.__dict__}
        return attrs.frozen(type(owner.__name__, owner.__bases__, body))

    def _signature(made):
        """What `inspect.signature` says of a class."""
        import inspect

        return inspect.signature(made)
