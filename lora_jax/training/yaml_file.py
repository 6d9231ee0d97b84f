"""YAML from elsewhere: plain values, each name once, and no more of them than a person writes."""

from __future__ import annotations

from pathlib import Path

import yaml

from lora_jax import files
from lora_jax.text import clipped

_LARGEST = 2**20  # bytes
_MOST_NODES = 20_000  # with what aliases repeat
_DEEPEST = 50
_MOST_BITS = 512  # of a whole number; Python doesn't print one of more than 4,300 digits


def read_yaml_file(path: str | Path) -> object:
    """The content of a YAML file.

    Aliases and merged mappings are resolved; aliases that contain themselves or multiply to too many values are
    refused.

    Raises:
        FileError: The file can't be read (see `files.read_text`), isn't YAML, has a repeated name or one that isn't a
            text, a value that doesn't fit its tag, or too many values or levels. Line and column are named.
    """
    text = files.read_text(path, max_bytes=_LARGEST)
    try:
        return yaml.load(text, Loader=_Loader)  # of plain values: `_Loader` is a `SafeLoader`
    except yaml.YAMLError as error:
        raise files.FileError(f"{path} can't be read as YAML: {_told(error)}.") from None


class _Loader(yaml.SafeLoader):
    """`SafeLoader`, which guards against code, with what guards against sizes, and against what it lets pass."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._depth += 1
        self._nodes += 1
        if self._depth > _DEEPEST:
            raise _error(f"nested more than {_DEEPEST} levels deep", mark)
        if self._nodes > _MOST_NODES:
            raise _error(f"more than {_MOST_NODES:,} values", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _count(node, {}, ())
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Names are held against each other before what `<<` merges joins them, which they are there to replace."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                said = f"`{clipped(key.value)}`" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise _error(f"{said} stands where a name is expected: put it in quotes, if it is one", key.start_mark)
            if key.value in seen:
                raise _error(f"`{clipped(key.value)}` is there twice: leave one out", key.start_mark)
            seen.add(key.value)
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, OverflowError, AttributeError, TypeError, KeyError, IndexError) as error:
            kind = node.tag.rpartition(":")[2]
            said = clipped(str(node.value)) if isinstance(node, yaml.ScalarNode) else "this"
            raise _error(f"`{said}` is no {kind} ({clipped(str(error))})", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _error(f"a whole number of {value.bit_length():,} bits", node.start_mark)
        return value


def _told(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return clipped(" ".join(str(error).split()), 600)
    said = " ".join(part for part in (error.context, error.problem) if part)
    return f"{clipped(said, 600)}, line {mark.line + 1}, column {mark.column + 1}"


def _count(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values of a node, with those that aliases repeat."""
    if id(node) in above:
        raise _error("an alias that contains itself", node.start_mark)
    if id(node) not in counted:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        counted[id(node)] = 1 + sum(_count(child, counted, (*above, id(node))) for child in children)
        if counted[id(node)] > _MOST_NODES:
            raise _error(f"aliases that repeat more than {_MOST_NODES:,} values", node.start_mark)
    return counted[id(node)]


def _error(what: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)
