"""What jsonargparse's nested report of a fault comes down to: the key, what was given, what is accepted.

It lists every type of every union on the way to a key. What matters is at the end of the longest path.
"""

from __future__ import annotations

import re

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
    """One line for a fault of the parser; a message that is no nested report stays as it is."""
    if "Parser key" not in message:
        return message
    said = _said(message)
    path = max(said, key=lambda found: len(found[0]))[0]
    texts = [text for at, text in said if at == path and not text.startswith("Expected a path")]
    given = next((text[13:] for text in texts if text.startswith("Given value: ")), None)
    accepted = list[str]()
    others = list[str]()
    for text in texts:
        if unknown := re.match(r"Option '([\w.+-]+)' is not accepted\.?(.*)", text):
            return f"{'.'.join(path)}: there is no key '{unknown[1]}'.{unknown[2]}"
        if name := re.match(r"Expected a dot import path string: (.*)", text):
            accepted, given = [*accepted, "the class_path of a class"], name[1]
        elif expected := _EXPECTED.match(text):
            accepted.append(_type(expected[1]))
            given = expected[2] if expected[2] is not None else given
        elif text and not text.startswith("Given value"):
            others.append(text)
    wanted = " or ".join(dict.fromkeys(each for each in accepted if each))
    if not others and wanted:
        shown = given if given is None or len(given) < 200 else f"{given[:200]} ..."
        return f"{'.'.join(path)}: '{shown}' given; accepted: {wanted}."
    return f"{'.'.join(path)}: {'; '.join(dict.fromkeys(others)) or 'it cannot be read'}."


def _said(message: str) -> list[tuple[tuple[str, ...], str]]:
    """Each line that says something, with the path of the keys it stands under."""
    said, stack = list[tuple[tuple[str, ...], str]](), list[tuple[int, str]]()
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
            said.append((tuple(name for _, name in stack), re.sub(r"\. Got value: Namespace.*$", "", text)))
        elif key is not None:
            said.append((tuple(name for _, name in stack), ""))
    return said


def _type(name: str) -> str:
    if literal := re.match(r"typing\.Literal\[(.*)\]", name):
        return literal[1]
    return _TYPES.get(name) or name.removeprefix("<class '").removesuffix("'>").split(".")[-1]
