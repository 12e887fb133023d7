"""What the small benchmark compares: methods, tables, and settings chosen on a part of train.

The methods are the thesis' (sections 2.1 to 2.5) on data that two CPU cores can learn; their
configurations are in configs/benchmark. A run's settings are those of its file, of its seed, and of
the choices of its method.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..curation.split_parts import draw_train, group_images, objects_by_image, take_part
from ..data.coco_file import write_coco
from ..data.sound_coco import read_sound_coco
from ..data.sources import find_path

Pairs = tuple[str, ...]  # KEY, VALUE, KEY, VALUE, ...

TUNING_SHARE, TUNING_SEED = 0.8, 1


@dataclass(frozen=True)
class Method:
    """A row of a table; `config` is a file of configs/benchmark, `choices` are names of those."""

    name: str
    title: str
    config: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Methods that are compared with the first one, on one data set (a folder of the data root)."""

    name: str
    title: str
    dataset: str
    methods: tuple[Method, ...]
    percent: float = 100.0


@dataclass(frozen=True)
class Choice:
    """Settings that a family of methods shares.

    The best of `candidates` (label to settings) is the one with the highest mean AP of `judges`,
    each trained once with it on four fifths of the training file and scored on the last fifth.
    `settings` are those of all its trainings.
    """

    name: str
    table: Table
    judges: tuple[Method, ...]
    candidates: Mapping[str, Pairs]
    settings: Pairs = ()


@dataclass(frozen=True)
class Run:
    """One training: its folder below the output folder, its file of configs/benchmark, settings."""

    folder: str
    config: str
    settings: Pairs


def _rates(*values: float) -> dict[str, Pairs]:
    return {str(value): ("SOLVER.BASE_LR", str(value)) for value in values}


def _pseudo(*pairs: tuple[float, float]) -> dict[str, Pairs]:
    """Thresholds delta of pseudo labels, with a weight for the losses of classes and IoU branch.

    Weights of the box losses are the methods' own: 0 for Unbiased Teacher, 1 for IL-net.
    """
    keys = ("CLS", "RPN_CLS", "IOU")
    found = {}
    for delta, weight in pairs:
        weights = (x for key in keys for x in (f"SEMISUP.LOSS_WEIGHT.{key}", str(weight)))
        found[f"{delta}-{weight}"] = ("SEMISUP.PSEUDO.SCORE_THRESH", str(delta), *weights)
    return found


MASK_RCNN = Method("mask_rcnn", "Mask R-CNN", "coffee_leaf_mask_rcnn", ("rate_mask_rcnn",))
HTC = Method("htc", "HTC", "coffee_leaf_htc", ("rate_r3_cnn",))
R3_CNN = Method("r3_cnn", "R3-CNN", "coffee_leaf_r3_cnn", ("rate_r3_cnn",))
GROIE = Method("r3_cnn_groie", "R3-CNN + GRoIE", "coffee_leaf_r3_cnn_groie", ("rate_r3_cnn",))
SBR_CNN = Method("sbr_cnn", "SBR-CNN", "coffee_leaf_sbr_cnn", ("rate_sbr_cnn",))
C2SSL = Method("r3_cnn_c2ssl", "R3-CNN + C2SSL", "coffee_leaf_r3_cnn_c2ssl", ("rate_r3_cnn",))
MASK_STUDENT = Method(
    "il_net_mask_rcnn",
    "IL-net with Mask R-CNN",
    "coffee_leaf_il_net_mask_rcnn",
    ("rate_mask_rcnn", "pseudo_coffee_leaf"),
)
SBR_STUDENT = Method(
    "il_net_sbr_cnn",
    "IL-net with SBR-CNN",
    "coffee_leaf_il_net_sbr_cnn",
    ("rate_sbr_cnn", "pseudo_coffee_leaf"),
)
SUPERVISED = Method("supervised", "supervised", "bccd_supervised", ("rate_bccd",))
UNBIASED_TEACHER = Method(
    "unbiased_teacher", "Unbiased Teacher", "bccd_unbiased_teacher", ("rate_bccd", "pseudo_bccd")
)
IL_NET = Method("il_net", "IL-net", "bccd_il_net", ("rate_bccd", "pseudo_bccd"))

LEAVES = Table(
    "coffee_leaf",
    "Coffee leaves, all labels",
    "coffee_leaf",
    (MASK_RCNN, HTC, R3_CNN, GROIE, SBR_CNN, C2SSL),
)
LEAVES_10 = Table(
    "coffee_leaf_10",
    "Coffee leaves, 10 % labelled",
    "coffee_leaf",
    (MASK_STUDENT, SBR_STUDENT),
    10.0,
)
CELLS = {
    percent: Table(
        f"bccd_{percent}",
        f"Blood cells, {percent} % labelled",
        "bccd",
        (SUPERVISED, UNBIASED_TEACHER, IL_NET),
        float(percent),
    )
    for percent in (5, 10, 20)
}
TABLES = (LEAVES, CELLS[10], LEAVES_10, CELLS[5], CELLS[20])
# Learning rates are compared over half of the steps, the cosine ending there; one for all detectors
# with loops of fully connected heads.
_LEAVES_HALF, _CELLS_HALF = ("SOLVER.MAX_ITER", "150"), ("SOLVER.MAX_ITER", "200")
_RATES, _LOW_RATES = _rates(0.01, 0.02, 0.03), _rates(0.0025, 0.005, 0.01)
_PSEUDO = _pseudo((0.5, 1.0), (0.7, 1.0))
CHOICES = (
    Choice("rate_mask_rcnn", LEAVES, (MASK_RCNN,), _RATES, _LEAVES_HALF),
    Choice("rate_r3_cnn", LEAVES, (R3_CNN,), _RATES, _LEAVES_HALF),
    Choice("rate_sbr_cnn", LEAVES, (SBR_CNN,), _LOW_RATES, _LEAVES_HALF),
    Choice("rate_bccd", CELLS[10], (SUPERVISED,), _RATES, _CELLS_HALF),
    Choice("pseudo_bccd", CELLS[10], (UNBIASED_TEACHER, IL_NET), _PSEUDO),
    Choice("pseudo_coffee_leaf", LEAVES_10, (MASK_STUDENT, SBR_STUDENT), _PSEUDO),
)


def select_tables(names: Sequence[str], only: Sequence[str]) -> list[Table]:
    """Some tables, with some methods.

    Args:
        names: of tables; empty: all.
        only: names of methods; empty: all. A table without any of them is left out.

    Raises:
        ValueError: a name that there is not.
    """
    known = {"--tables": [t.name for t in TABLES]}
    tables = [t for t in TABLES if not names or t.name in names]
    known["--only"] = [m.name for t in tables for m in t.methods]
    for option, asked in (("--tables", names), ("--only", only)):
        unknown = [name for name in asked if name not in known[option]]
        if unknown:
            raise ValueError(f"{option} {unknown[0]}: write some of {sorted(set(known[option]))}")
    kept = []
    for table in tables:
        methods = tuple(m for m in table.methods if not only or m.name in only)
        if methods:
            kept.append(Table(table.name, table.title, table.dataset, methods, table.percent))
    return kept


def needed_choices(methods: Iterable[Method]) -> list[Choice]:
    """What must be chosen before these methods' runs, in an order in which it can be."""
    needed = {name for method in methods for name in method.choices}
    for choice in reversed(CHOICES):  # a judge's own earlier choices
        if choice.name in needed:
            needed.update(name for judge in choice.judges for name in judge.choices)
    return [choice for choice in CHOICES if choice.name in needed]


def planned(tables: Sequence[Table], seeds: Sequence[int]) -> Iterator[tuple[Table, Method, int]]:
    """Breadth first: everything with the first seed, then with the second, ..."""
    for seed in seeds:
        for table in tables:
            for method in table.methods:
                yield table, method, seed


def final_run(table: Table, method: Method, seed: int, chosen: Mapping[str, Pairs]) -> Run:
    """A training on the whole training file, scored on val.

    Args:
        chosen: the settings of each `Choice` by name; those of the method must be there.
    """
    settings = [*_seeded(table, seed)]
    for name in method.choices:
        settings += chosen[name]
    return Run(run_folder(table, method, seed), method.config, tuple(settings))


def run_folder(table: Table, method: Method, seed: int) -> str:
    """Where a training of a table is, below the output folder."""
    return f"{table.name}/{method.name}/seed{seed}"


def tuning_run(
    choice: Choice, judge: Method, label: str, chosen: Mapping[str, Pairs], part: Path
) -> Run:
    """A training on `part`, with a candidate of a choice and the method's earlier choices.

    Args:
        part: of `write_tuning_part`.
    """
    registered = [
        {
            "name": f"tuning_{kind}",
            "type": "coco",
            "json": str((part / f"{kind}.json").resolve()),
            "images": f"{choice.table.dataset}/images",
        }
        for kind in ("train", "val")
    ]
    settings = [*_seeded(choice.table, TUNING_SEED)]
    settings += ["DATASETS.REGISTER", repr(registered)]
    settings += ["DATASETS.TRAIN", "tuning_train", "DATASETS.TEST", "tuning_val"]
    settings += ["TEST.EVAL_PERIOD", "0"]
    for name in judge.choices[: judge.choices.index(choice.name)]:
        settings += chosen[name]
    settings += (*choice.settings, *choice.candidates[label])
    return Run(f"tuning/{choice.name}/{judge.name}-{label}", judge.config, tuple(settings))


def _seeded(table: Table, seed: int) -> Pairs:
    """The same seed means the same labelled images in the same order, for every method."""
    split = ("DATASETS.SPLIT.PERCENT", str(table.percent), "DATASETS.SPLIT.SEED", str(seed))
    return ("SEED", str(seed), *split)


def annotation_file(dataset: str, part: str) -> Path:
    """The COCO file of a data set's "train" or "val".

    Raises:
        FileNotFoundError: there is none under DETECTRON2_DATASETS.
    """
    path = f"{dataset}/annotations/instances_{part}.json"
    return Path(find_path(path, f"data set {dataset}", lambda p: Path(p).is_file(), "file"))


def write_tuning_part(dataset: str, folder: Path) -> Path:
    """Cut the training file of a data set in four fifths and one, by images; val is not touched.

    The same images on any machine: see `draw_train`. Classes are in proportion.

    Args:
        folder: where a folder with train.json and val.json is made.

    Returns:
        That folder.
    """
    data = read_sound_coco(annotation_file(dataset, "train"))
    objects = objects_by_image(data)
    train = draw_train(group_images(data["images"]), TUNING_SHARE, TUNING_SEED, objects)
    part = folder / dataset
    for kind, ids in (("train", train), ("val", objects.keys() - train)):
        origin = {"part": kind, "fraction": TUNING_SHARE, "seed": TUNING_SEED}
        write_coco(part / f"{kind}.json", take_part(data, ids, origin))
    return part
