"""The command line: what the kernel reads is what was meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import Cmdline, CmdlineError
from linux_loader.encode import encode_cmdline
from linux_loader.testing import cmdlines


def kernel_words(text: str) -> list[tuple[str, str | None]]:
    """Split as `parse_args` and `next_arg` of Linux do, down to where init's part begins."""
    result: list[tuple[str, str | None]] = []
    text = text.lstrip(" ")
    while text:
        quoted_start = text[0] == '"'
        if quoted_start:
            text = text[1:]
        in_quote, equals, index = quoted_start, 0, 0
        while index < len(text) and (in_quote or text[index] != " "):
            if equals == 0 and text[index] == "=":
                equals = index
            if text[index] == '"':
                in_quote = not in_quote
            index += 1
        word, text = text[:index], text[index + 1 :].lstrip(" ")
        if quoted_start and word.endswith('"'):
            word = word[:-1]
        if not equals:
            if word == "--":
                result.append(("--", text))
                return result
            result.append((word, None))
        else:
            value = word[equals + 1 :]
            if value.startswith('"'):
                value = value[1:].removesuffix('"')
            result.append((word[:equals], value))
    return result


@given(cmdlines())
def test_what_is_built_is_read_back(line: Cmdline) -> None:
    """Parsing the text of a line gives the line."""
    assert Cmdline.parse(str(line)) == line


@given(
    st.lists(
        st.tuples(
            st.text(st.sampled_from("ab._-1"), min_size=1, max_size=5),
            st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=8),
        ),
        max_size=4,
    )
)
def test_the_kernel_reads_what_was_meant(pairs: list[tuple[str, str]]) -> None:
    """Whatever value is accepted, Linux's own algorithm finds that name with that value."""
    line, meant = Cmdline(), []
    for name, value in pairs:
        try:
            line = line.with_parameter(name, value)
        except CmdlineError:
            assert '"' in value
            continue
        meant.append((name, value))
    assert kernel_words(str(line)) == meant


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Parsing accepts printable ASCII with closed quotation marks, and keeps every word."""
    try:
        line = Cmdline.parse(text)
    except CmdlineError:
        return
    assert text.isascii()
    assert Cmdline.parse(str(line)) == line


def test_arguments_for_init_follow_the_dashes() -> None:
    """The first unquoted `--` ends the kernel's part; later ones belong to init."""
    line = Cmdline.parse('quiet x="a -- b" -- one -- two')
    assert line.parameters == ("quiet", 'x="a -- b"')
    assert line.init_args == ("one", "--", "two")
    assert str(line) == 'quiet x="a -- b" -- one -- two'


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("", ["x"]),
        ("a b", ["x"]),
        ("a=b", ["x"]),
        ('a"', ["x"]),
        ("a", ['"']),
        ("a", ['b" c="d']),
        ("a", ["b\n"]),
        ("a", ["b\0"]),
        ("a", ["\x7f"]),
        ("a", ["é"]),
        ("a", ["x,y", "z"]),
        ("a", []),
    ],
)
def test_what_the_kernel_would_misread_is_refused(name: str, values: list[str]) -> None:
    """Names and values that would arrive changed, split or joined are errors."""
    with pytest.raises(CmdlineError):
        Cmdline().with_parameter(name, *values)


@pytest.mark.parametrize("word", ["--", '"--"', "a -- b", "", '"', " "])
def test_no_flag_smuggles_arguments_for_init(word: str) -> None:
    """A flag cannot end the kernel's part of the line, quoted or not."""
    with pytest.raises(CmdlineError):
        Cmdline().with_flag(word)
    with pytest.raises(CmdlineError):
        Cmdline(parameters=(word,))


def test_capacity_is_exact() -> None:
    """A line of exactly the capacity fits, one character more does not."""
    assert encode_cmdline("x" * 255, 255) == b"x" * 255 + b"\0"
    with pytest.raises(CmdlineError, match="255 characters"):
        encode_cmdline("x" * 256, 255)
    assert Cmdline().with_flag("quiet").encode(5) == b"quiet\0"
    with pytest.raises(CmdlineError):
        Cmdline().with_flag("quiet").encode(4)


def test_the_place_of_a_bad_character_is_named() -> None:
    """The error's offset counts characters up to the one that is not allowed."""
    with pytest.raises(CmdlineError) as caught:
        encode_cmdline("quiet\tro", 100)
    assert (caught.value.offset, caught.value.value) == (5, "\t")


@pytest.mark.parametrize(
    ("size", "text"), [(1 << 30, "1G"), (3 << 20, "3M"), (4096, "4K"), (4097, "4097"), (512, "512")]
)
def test_virtio_mmio_sizes_are_exact(size: int, text: str) -> None:
    """A unit is used only where nothing is lost by it."""
    line = Cmdline().with_virtio_mmio(size, 0x1000, 5, 42)
    assert str(line) == f"virtio_mmio.device={text}@0x1000:5:42"


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1, -1)])
def test_impossible_virtio_mmio_devices_are_refused(arguments: tuple[int, ...]) -> None:
    """No window without bytes, and nothing negative."""
    with pytest.raises(CmdlineError):
        Cmdline().with_virtio_mmio(*arguments)


def test_init_words_are_quoted_and_checked() -> None:
    """A blank in a word for init is quoted; a quotation mark cannot be."""
    assert str(Cmdline().with_init("a b")) == '-- "a b"'
    for word in ("", 'a"b'):
        with pytest.raises(CmdlineError):
            Cmdline().with_init(word)
