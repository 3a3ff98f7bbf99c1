"""Shorten jsonargparse's nested report of a fault to one line: the key, the value, what is accepted.

The report gives a reason for every type of every union on the way to the key at fault. Only those under the
longest path of keys say what is wrong, and only they are kept.
"""

from __future__ import annotations

import re

EXPERIMENT = "configs/search/gumbel_topk.yaml"
"""What a user who names no experiment is shown."""
_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_NESTED = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value type:|Problem with given class_path|$)"
)
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
    "<class 'collections.abc.Iterable'>": "a list",
}


def in_short(message: str) -> str:
    """Return a parser's report of a fault as one line; a message that is no nested report stays as it is."""
    if re.match(r"the following arguments are required: (\w+\.)?model\b", message):
        return (
            f"--config: no experiment given; accepted: a YAML file that names a model, such as {EXPERIMENT}"
        )
    if "Parser key" not in message:
        return message
    lines = _lines(message)
    path = max(lines, key=lambda line: len(line[0]))[0]
    texts = [text for at, text in lines if at == path and not text.startswith("Expected a path")]
    value = next((text[13:] for text in texts if text.startswith("Given value: ")), None)
    accepted = list[str]()
    others = list[str]()
    for text in texts:
        if unknown := re.match(r"Option '([\w.+-]+)' is not accepted\.?(.*)", text):
            return f"{'.'.join(path)}: there is no key '{unknown[1]}'.{unknown[2]}"
        if name := re.match(r"Expected a dot import path string: (.*)", text):
            accepted, value = [*accepted, "the class_path of a class"], name[1]
        elif expected := _EXPECTED.match(text):
            accepted.append(_type(expected[1]))
            value = expected[2] if expected[2] is not None else value
        elif text and not text.startswith("Given value"):
            others.append(text)
    choices = " or ".join(dict.fromkeys(each for each in accepted if each))
    if not others and choices:
        shown = value if value is None or len(value) < 200 else f"{value[:200]} ..."
        return f"{'.'.join(path)}: '{shown}' given; accepted: {choices}."
    return f"{'.'.join(path)}: {'; '.join(dict.fromkeys(others)) or 'it cannot be read'}."


def _lines(message: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the lines that carry a reason, each with the path of keys above it."""
    lines, stack = list[tuple[tuple[str, ...], str]](), list[tuple[int, str]]()
    for line in filter(str.strip, message.splitlines()):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        key = _KEY.search(text)
        while stack and (indent < stack[-1][0] or (key is not None and indent == stack[-1][0])):
            stack.pop()
        if key is not None:
            stack.append((indent, key[1]))
            text = text[key.end() :]
        if not _NESTED.match(text):
            lines.append((tuple(name for _, name in stack), re.sub(r"\. Got value: Namespace.*$", "", text)))
        elif key is not None:
            lines.append((tuple(name for _, name in stack), ""))
    return lines


def _type(name: str) -> str:
    if literal := re.match(r"typing\.Literal\[(.*)\]", name):
        return literal[1]
    return _TYPES.get(name) or name.removeprefix("<class '").removesuffix("'>").split(".")[-1]
