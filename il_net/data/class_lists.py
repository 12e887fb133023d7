"""One class list for the model: datasets are compared with it, and mapped to it, by name."""

from collections.abc import Iterable, Mapping, Sequence

ClassNames = tuple[str, ...]


def model_classes(train: Mapping[str, ClassNames]) -> ClassNames:
    """The class list of the training sets: the longest, of which all others are subsequences.

    Args:
        train: class names of each training set, in the order of their contiguous ids.

    Returns:
        the names in the order of the model's class ids; empty without training sets.

    Raises:
        ValueError: a training set has a class that the longest lacks, or orders them otherwise.
    """
    if not train:
        return ()
    longest = max(train, key=lambda name: len(train[name]))
    for name, names in train.items():
        check_fits(name, names, train[longest], f"'{longest}'", key="DATASETS.TRAIN")
    return train[longest]


def check_fits(
    dataset: str, names: ClassNames, model: ClassNames, model_from: str, *, key: str
) -> None:
    """Check that `names` is a subsequence of the model's list; a missing class is fine.

    Raises:
        ValueError: shows both lists, the datasets, what differs and what to do.
    """
    if is_subsequence(names, model):
        return
    unknown = [name for name in names if name not in model]
    if unknown:
        differs = f"{unknown} are not among the model's classes"
        advice = (
            "correct the names in the file, or, if the model shall learn them, give `classes: "
            f"{list(model) + unknown}` to the DATASETS.REGISTER entry of each dataset"
        )
    else:
        differs = "the names are in another order"
        advice = (
            f"give `classes: {list(model)}` to the DATASETS.REGISTER entry of '{dataset}'; its "
            "annotations are then mapped by name"
        )
    raise ValueError(
        f"The classes of '{dataset}' ({key}) do not agree with the model's: {differs}.\n"
        f"  model (from {model_from}): {list(model)}\n"
        f"  {dataset}: {list(names)}\n"
        f"What to do: {advice}."
    )


def check_equal(
    dataset: str, names: ClassNames, model: ClassNames, model_from: str, *, key: str
) -> None:
    """Check a dataset that we did not register, and so cannot map: no class may be missing.

    Raises:
        ValueError: shows both lists, the datasets and what to do.
    """
    if names == model:
        return
    raise ValueError(
        f"The classes of '{dataset}' ({key}) differ from the model's. '{dataset}' was registered "
        "outside DATASETS.REGISTER, so its class ids cannot be mapped by name.\n"
        f"  model (from {model_from}): {list(model)}\n"
        f"  {dataset}: {list(names)}\n"
        "What to do: register its files under a new name in DATASETS.REGISTER, with `classes: "
        f"{list(model)}` if the order differs; or leave the dataset out."
    )


def is_subsequence(names: Sequence[str], of: Iterable[str]) -> bool:
    """Whether `names` occur in `of` in the same order, gaps allowed."""
    rest = iter(of)
    return all(name in rest for name in names)


def contiguous_ids(own: Iterable[tuple[int, str]], model: ClassNames) -> dict[int, int]:
    """Map a file's category ids to the model's class ids 0..K-1, by name.

    Every model class gets an entry, because Detectron2's COCOEvaluator asserts that the values are
    exactly 0..K-1: a class that the file lacks gets an id beyond the file's largest one.

    Args:
        own: (id, name) of the file's categories, all names in `model`.
        model: the model's class names.

    Returns:
        category id -> class id, in the order of the class ids.
    """
    id_of = {name: category_id for category_id, name in own}
    unused = max(id_of.values(), default=0) + 1
    mapping = {}
    for index, name in enumerate(model):
        if name not in id_of:
            id_of[name] = unused
            unused += 1
        mapping[id_of[name]] = index
    return mapping
