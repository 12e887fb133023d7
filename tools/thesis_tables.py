"""The rows of the thesis' results tables, as configs/thesis_tables.yaml has them.

What the keys of that file mean is said at its head. A row's settings and overrides become one list
of configuration keys; counts of parameters are compared as the thesis prints them, cut off.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from count_parameters import count_trainable
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILE = CONFIGS / "thesis_tables.yaml"
_UNITS = {"": 1, "K": 10**3, "M": 10**6}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
        id: "2.15/5", table and row, or "fig2.16b/1", figure and curve.
        caption: the table's or figure's.
        keys: configuration keys and values on top of ``config``.
        notes: those of the table, then the row's own.
        others: as the head of the file says.
    """

    id: str
    title: str
    caption: str
    thesis: dict
    keys: dict
    notes: tuple[str, ...]
    config: str = ""
    exact_params: int | None = None
    params_reading: dict | None = None
    same_weights_as: str = ""
    module: str = ""
    external: bool = False

    @property
    def table(self) -> str:
        """What is before the slash: "2.15", or "fig2.16b"."""
        return self.id.split("/")[0]

    @property
    def heading(self) -> str:
        """The table's or figure's name and caption."""
        name = f"Table {self.table}"
        if self.table.startswith("fig"):
            name = f"Fig. {self.table.removeprefix('fig')}"
        return f"{name}: {self.caption}"

    @property
    def decimals(self) -> int:
        """With how many decimals the thesis prints the row's average precisions."""
        values = [v for task in ("box", "mask") for v in self.thesis.get(task, {}).values()]
        return max((len(str(value).partition(".")[2]) for value in values), default=1)

    def printed_ap(self, task: str) -> str:
        """The thesis' AP of "box" or "mask", "" where there is none."""
        ap = self.thesis.get(task, {}).get("AP")
        return "" if ap is None else f"{ap:.{self.decimals}f}"

    @property
    def setup(self) -> str:
        """A text that is equal for rows that one run serves, in whichever tables they are."""
        return f"{self.title if self.external else self.config} {sorted(self.keys.items())}"

    def config_file(self) -> str:
        """Path of the row's configuration.

        Raises:
            ValueError: the row's model is not part of this project.
        """
        if self.external:
            raise ValueError(
                f"Row {self.id}, {self.title}, is another project's model: there is nothing to "
                "build or run here"
            )
        return str(CONFIGS / self.config)

    def options(self) -> list[str]:
        """The row's keys as on a command line: KEY, VALUE, KEY, VALUE, ..."""
        return as_options(self.keys)

    def resolve(self, options: list[str]) -> CfgNode:
        """The row's whole configuration; ``options`` are further KEY VALUE pairs, which win."""
        return load_config(self.config_file(), [*self.options(), *options], add_sbr_cnn_config)


def as_options(keys: dict) -> list[str]:
    """{KEY: value} as KEY, VALUE, KEY, VALUE, ..."""
    return [text for key, value in keys.items() for text in (key, str(value))]


def read_rows(file: Path = FILE) -> dict[str, Row]:
    """All rows by id, in the order of the thesis.

    Raises:
        ValueError: an id is used twice; a row has unknown attributes, settings, notes or table.
    """
    content = yaml.safe_load(file.read_text())
    settings, notes = content["settings"], content["notes"]
    rows: dict[str, Row] = {}
    for entry in content["rows"]:
        attributes = dict(entry)
        where = f"{file.name}: row {entry.get('id')}"
        if entry.get("id") in rows:
            raise ValueError(f"{where} is there twice")
        try:
            table = content["tables"][entry["id"].split("/")[0]]
            keys = {}
            for name in attributes.pop("settings", []):
                keys |= settings[name]
            keys |= attributes.pop("overrides", {})
            own = [attributes.pop("note")] if "note" in attributes else []
            texts = (*(notes[name] for name in table.get("notes", [])), *own)
            row = Row(**attributes, keys=keys, caption=table["caption"], notes=texts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: unknown or missing: {error}") from error
        rows[row.id] = row
    return rows


def find_row(rows: dict[str, Row], row_id: str) -> Row:
    """The row of that id.

    Raises:
        ValueError: there is none; names near ones.
    """
    if row_id not in rows:
        near = difflib.get_close_matches(row_id, rows, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"There is no row {row_id!r} (rows are named as 2.15/5){hint}")
    return rows[row_id]


def select_table(rows: dict[str, Row], table: str | None) -> list[Row]:
    """The rows of one table, or with None all.

    Raises:
        ValueError: there is no such table; names all.
    """
    selected = [row for row in rows.values() if table in (None, row.table)]
    if not selected:
        tables = dict.fromkeys(row.table for row in rows.values())
        raise ValueError(f"There is no table {table!r}; there are {', '.join(tables)}")
    return selected


def equals_printed(count: int, printed: str) -> bool:
    """Whether ``count``, cut off after the last printed digit, is "44,170 K" or "38.6 M".

    Raises:
        ValueError: ``printed`` is not such a figure.
    """
    figure = re.fullmatch(r"(\d[\d,.]*) ?([KM]?)", printed)
    if not figure:
        raise ValueError(f"params: {printed!r} is not a figure as 44,170 K or 38.6 M")
    digits, unit = figure.groups()
    decimals = len(digits.partition(".")[2])
    return count * 10**decimals // _UNITS[unit] == int(re.sub("[,.]", "", digits))


class ParameterCounter:
    """Counts what trains in a row's model; builds every model once.

    Where the configuration takes the number of classes from the data, it is COCO's 80. Models are
    built without values, on the meta device.
    """

    def __init__(self) -> None:
        self._models: dict[str, nn.Module] = {}

    def build(self, cfg: CfgNode) -> nn.Module:
        """The model of a configuration, on the meta device."""
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = "meta"
        text = f"{cfg.MODEL.dump()}{cfg.SEMISUP.DETECTOR}"
        if text not in self._models:
            with torch.device("meta"):
                self._models[text] = build_model(cfg)
        return self._models[text]

    def count(self, row: Row, keys: dict | None = None) -> int:
        """Trainable parameters of the row's model (or ``module``), with ``keys`` changed."""
        cfg = row.resolve(as_options(keys or {}))
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES or 80
        return count_trainable(self.build(cfg).get_submodule(row.module))

    def check(self, row: Row) -> tuple[str, str, bool]:
        """Compare with the thesis: (count as text, verdict, whether all is explained)."""
        if row.external:
            return "", "not part of this project", True
        count = self.count(row)
        text, printed = f"{count:,}", row.thesis.get("params")
        if row.exact_params not in (None, count):
            return text, f"DIFFERS from exact_params {row.exact_params:,}", False
        if printed is None:
            return text, "nothing printed" if row.exact_params is None else "as computed", True
        if row.params_reading is None:
            equal = equals_printed(count, printed)
            return text, "as printed" if equal else f"DIFFERS from {printed}", equal
        keys, exact = row.params_reading["overrides"], row.params_reading["exact_params"]
        other = self.count(row, keys)
        reading = f"with {' '.join(as_options(keys))} {other:,}"
        if other == exact and equals_printed(other, printed):
            return text, f"as printed {reading}", True
        return text, f"DIFFERS from {printed}, also {reading}", False
