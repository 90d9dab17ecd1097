"""The part of YAML that data.yaml files need, read exactly or refused with its line; so no package for YAML is needed.

    path: ../ds         # comments, at the start of a line or after a space
    train:
      - images/a        in place of such a list also: lines `key: value`
    names: [car, "b\\u0075s", 'lane #1']        or {0: car, 1: bus}, over several lines too

All values are texts, None, lists or dicts. Flow lists and maps are translated to JSON. Anchors, tags, tabs, texts over
several lines and deeper blocks are refused. Keys that no reader asks for are skipped with all that is indented below.
"""
import json
import re

from data.labels.records import read_lines
from utils.errors import UserError
from utils.files import show, unique

KEYS = ("path", "train", "val", "test", "nc", "names")
QUOTED = r"""(?<![^\s,\[{:-])(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')"""
FIRST = r"""(?:[^\s\[\]{},:#&*!|>'"%@`?-]|-(?=[^\s,\[\]{}])|~)"""  # of a text without quotes
FLOW_TEXT = rf"{FIRST}(?:[^\[\]{{}},:]|:(?=[^\s\[\]{{}},]))*"
TEXT = rf"{FIRST}(?:[^:]|:(?=\S))*"
COMMENT = re.compile(rf"({QUOTED})|(?<!\S)#.*")
LINE = re.compile(rf"( *)(?:(-)(?= |$)|({QUOTED}|{TEXT}?) *:(?= |$))? *(.*)")  # indentation, dash, key, value


def read(path):
    """-> {key: value} of a YAML file. Raises UserError naming the line."""
    lines = [(number, COMMENT.sub(r"\1", line).rstrip()) for number, line in enumerate(read_lines(path), 1)]
    lines = iter([(number, line) for number, line in lines if line and (number > 1 or line != "---")])
    found, shape = [], None  # [key, value or the block's (key, value)]; indentation and kind of the block's lines
    try:
        for number, line in lines:
            indent, dash, key, value = LINE.fullmatch(line).groups()
            below = bool(indent or dash)
            if below and found and found[-1][0] not in KEYS:
                continue
            while value[:1] in ("[", "{") and _open(value) and (more := next(lines, None)):
                value += " " + more[1].strip()
            pair = [key and _value(key), _value(value) if key is None or below or key in KEYS else None]
            if not below:
                found.append(pair)
                shape = None
            elif found[-1][1] is None or shape == (indent, dash):
                shape = indent, dash
                found[-1][1] = [*(found[-1][1] or ()), pair]
            else:
                raise ValueError("its indentation is another than above")
        if [key for key, _ in found] == [None] and type(found[0][1]) is dict:  # the whole file is a flow map
            return found[0][1]
        return unique([(key, _block(value)) for key, value in found])
    except (ValueError, IndexError, RecursionError):
        raise UserError(f"{path}: line {number}: {show(line)} is not understood, or stands there twice; write plain "
                        f"YAML without anchors, tags and tabs, or the names into classes.txt instead") from None


def _block(value):
    """A value, or [[key, value]] of the lines below a key -> a list or dict."""
    if type(value) is not list or not value or type(value[0]) is not list:
        return value
    return [item for _, item in value] if value[0][0] is None else unique(value)


def _open(text):
    """Whether more brackets are opened than closed."""
    marks = re.sub(QUOTED, "", text)
    return len(re.findall(r"[\[{]", marks)) > len(re.findall(r"[\]}]", marks))


def _value(text):
    """A text, flow list or flow map -> its value. Raises ValueError."""
    def as_json(found):
        quoted, plain = found.groups()
        if plain:
            return "null" if plain.strip() in ("~", "null") else json.dumps(plain.strip())
        return quoted if quoted[0] == '"' else json.dumps(quoted[1:-1].replace("''", "'"))

    token = FLOW_TEXT if text[:1] in ("[", "{") else TEXT
    text = re.sub(rf"({QUOTED})|({token})", as_json, text or "null")
    return json.loads(re.sub(r",\s*([\]}])$", r"\1", text), object_pairs_hook=unique)
