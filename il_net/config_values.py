"""Values of a configuration, from YAML or a command line, compared with the types of the defaults.

Detectron2's own comparison names types of Python, takes None for anything and looks into no list.
"""

import contextlib
import difflib
from ast import literal_eval
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

# A default's type in words: as one value, and as the values of a list.
_TYPES = {
    bool: ("True or False", "True and False"),
    int: ("a whole number", "numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}
# What is in lists whose default is empty.
_IN_EMPTY = {
    "DATASETS.CLASSES": "",
    "DATASETS.PROPOSAL_FILES_TRAIN": "",
    "DATASETS.PROPOSAL_FILES_TEST": "",
    "MODEL.FPN.IN_FEATURES": "res2",
    "TEST.KEYPOINT_OKS_SIGMAS": 0.1,
}
_BOOLS = {"true": "True", "yes": "True", "on": "True", "1": "True"}
_BOOLS |= {"false": "False", "no": "False", "off": "False", "0": "False"}


def read_values(loaded: dict, cfg: CfgNode, source: str) -> dict:
    """What a YAML file holds, with values of the types of ``cfg``'s.

    Raises:
        ValueError: an unknown key or a value of the wrong type; says what to write.
    """

    def read(loaded: dict, node: CfgNode, prefix: str) -> dict:
        values = {}
        for name, value in loaded.items():
            key = f"{prefix}{name}"
            if name not in node:
                raise unknown_key(key, cfg, source)
            if isinstance(value, dict) and isinstance(node[name], CfgNode):
                values[name] = read(value, node[name], f"{key}.")
            else:
                values[name] = _read_value(value, node[name], key, source)
        return values

    return read(loaded, cfg, "")


def read_option(key: str, value: Any, cfg: CfgNode, source: str) -> Any:
    """The value of a ``KEY VALUE`` pair; see :func:`read_values`."""
    node: Any = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            raise unknown_key(key, cfg, source)
        node = node[name]
    return _read_value(value, node, key, source)


def _read_value(value: Any, default: Any, key: str, source: str) -> Any:
    """``value``, or what it means as text, if it is of the type of ``default`` (None: any)."""
    if key in _IN_EMPTY:
        default = [_IN_EMPTY[key]]
    meant = value
    if isinstance(value, str):
        # As Detectron2 reads all text, that of YAML too: "(1, 2)" and 1e-3 are text there.
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            meant = literal_eval(value)
    if default is None or _fits(meant, default):
        if isinstance(default, float):
            return float(meant)  # 10 is as good as 10.0
        return value if isinstance(meant, str) else meant  # Detectron2 takes the quotes away
    if isinstance(default, CfgNode):
        raise ValueError(
            f"{source}: {key} is a group of keys, got {value!r}; write keys in it, "
            f"{next(iter(default))} for one"
        )
    one, several = _TYPES.get(type(_first(default)), ("", "values"))
    wanted = f"a list of {several}" if isinstance(default, (list, tuple)) else one
    spelling = _spelling(meant, default)
    raise ValueError(f"{source}: {key} is {wanted}, got {meant!r}; write {spelling}")


def unknown_key(key: str, cfg: CfgNode, source: str) -> ValueError:
    """The error for a key that ``cfg`` does not have; names similar ones and those elsewhere."""
    keys, wanted = list(_keys(cfg)), key.upper()
    name = wanted.rpartition(".")[2]
    elsewhere = [known for known in keys if known.rpartition(".")[2] == name]
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.7)
    near = list(dict.fromkeys([*(elsewhere if len(elsewhere) < 4 else ()), *near]))[:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"{source}: there is no configuration key {key}.{hint}")


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return False
        inner = default[0] if default else None
        if not any(isinstance(v, (list, tuple)) for v in value):
            inner = _first(default)  # Detectron2 takes a flat list of anchors for a nested one
        # Among others, 1 is as good as 1.0; a default that is () tells no type.
        inner = float(inner) if type(inner) is int else inner
        return inner is None or all(_fits(v, inner) for v in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def _first(default: Any) -> Any:
    while isinstance(default, (list, tuple)):
        default = default[0] if default else None
    return default


def _spelling(value: Any, default: Any) -> str:
    """What to write instead of ``value``: the same if that can be seen, or an example."""
    if isinstance(default, (list, tuple)):
        if isinstance(value, str) and value.startswith("["):  # names without quotes in it
            return f"{[name.strip() for name in value.strip('[]').split(',')]}"
        return f"[{value!r}]" if _fits([value], default) else f"a list as {list(default)}"
    if isinstance(value, (list, tuple)) and len(value) == 1 and _fits(value[0], default):
        return repr(value[0])
    if isinstance(default, bool):
        return _BOOLS.get(str(value).lower(), "True or False")
    if isinstance(default, str):
        single = type(value) in (bool, int, float)
        return f"\"'{value}'\"" if single else f"a text as {default!r}"
    # A decimal comma makes two numbers, or a text.
    pair = isinstance(value, tuple) and len(value) == 2
    text = ".".join(map(str, value)) if pair else str(value).replace(",", ".")
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text)
        if isinstance(default, float) or number == int(number):
            return f"{type(default)(number)}"
    return f"a number as {default}"
