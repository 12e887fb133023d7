"""Configuration keys of ``il_net`` and the one way a configuration is read."""

import contextlib
import difflib
import re
from ast import literal_eval
from collections.abc import Callable, Iterator

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

# Keys that take a tuple of names and accept a single plain name as well.
_NAME_TUPLES = ("TRAIN", "TEST")


def add_il_net_config(cfg: CfgNode) -> None:
    """Add the keys of ``il_net`` to a Detectron2 configuration."""
    # Datasets of your own, registered in every process. A list of
    #   {name, type: coco, json, images [, classes]}    COCO json and the folder of its images
    #   {name, type: voc, root, split [, classes]}      VOC folder, split is ImageSets/Main/<split>
    #   {name, type: images, images}                    folder or glob of images without labels
    # Relative paths lie under DETECTRON2_DATASETS (default "datasets"); "./x" is taken as it is.
    cfg.DATASETS.REGISTER = []
    # The model's class names in order. () = read from the training data; setup fills it in, so
    # that the config.yaml of a run names its classes.
    cfg.DATASETS.CLASSES = ()

    # Number format under SOLVER.AMP.ENABLED: "bf16", or "fp16" with loss scaling.
    cfg.SOLVER.AMP.DTYPE = "bf16"
    # Detectron2's SOLVER.CLIP_GRADIENTS.CLIP_TYPE ("value", or "norm" for every parameter by
    # itself) also takes "full_model": CLIP_VALUE bounds the norm of all gradients together.


def load_config(
    config_file: str, opts: list[str], *add_keys: Callable[[CfgNode], None]
) -> CfgNode:
    """Defaults, then a YAML file with its bases, then ``KEY VALUE`` pairs.

    Args:
        config_file: path of a YAML file, or "" for the defaults.
        opts: key, value, key, value, ...
        *add_keys: further ``add_xxx_config`` functions.

    Returns:
        A configuration that is not frozen, on the CPU where there is no GPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key or a value of the wrong type; names both.
    """
    cfg = get_cfg()
    for add in (add_il_net_config, *add_keys):
        add(cfg)
    if config_file:
        loaded = _read_yaml(config_file)
        datasets = loaded.get("DATASETS", {})
        for key in _NAME_TUPLES:
            if key in datasets:
                datasets[key] = _as_name_tuple(datasets[key], f"{config_file}: DATASETS.{key}")
        _merge(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(loaded)), config_file)
    if len(opts) % 2:
        raise ValueError(f"The command line needs KEY VALUE pairs, got {opts}")
    opts = list(opts)
    for i, key in enumerate(opts[::2]):
        if key in {f"DATASETS.{name}" for name in _NAME_TUPLES}:
            opts[2 * i + 1] = _as_name_tuple(opts[2 * i + 1], f"command line: {key}")
    _merge(cfg, lambda: cfg.merge_from_list(opts), "command line")
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _read_yaml(config_file: str) -> dict:
    try:
        loaded = CfgNode.load_yaml_with_base(config_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file {config_file}: {error}") from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"--config-file {config_file} has a YAML tag that can run code, which is not read "
            f"here; write the value out: {error}"
        ) from error
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(f"--config-file {config_file} is not a YAML mapping: {error}") from error
    nodes = (loaded, *(loaded.values() if isinstance(loaded, dict) else ()))
    if not isinstance(loaded, dict) or None in nodes:
        raise ValueError(f"--config-file {config_file} is not a mapping of keys, or one is empty")
    return loaded


def _merge(cfg: CfgNode, merge: Callable[[], None], source: str) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
        text = str(error.args[0]) if error.args else repr(error)
        unknown = re.fullmatch(r"Non-existent (?:config )?key: (\S+)", text)
        if not unknown:
            raise ValueError(f"{source}: {text}") from error
        near = difflib.get_close_matches(unknown[1], list(_keys(cfg)), n=3, cutoff=0.7)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"{source}: there is no configuration key {unknown[1]}.{hint}"
        ) from error


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _as_name_tuple(value: str | list | tuple, key: str) -> tuple[str, ...]:
    if isinstance(value, str) and value.strip().startswith(("(", "[", '"', "'")):
        # Detectron2's own YAMLs write tuples as text: ("name",)
        with contextlib.suppress(ValueError, SyntaxError):
            value = literal_eval(value)
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is a name or a list of names, got {value!r}")
    return tuple(names)
