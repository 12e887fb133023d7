"""Configuration keys of ``il_net`` and the one way a configuration is read."""

import contextlib
import io
import re
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from . import modeling  # noqa: F401  (registers the architectures that a configuration may name)
from .config_values import read_option, read_values
from .data import mapper  # noqa: F401  (lets Detectron2 read 16-bit gray)

# Keys that take a tuple of names and accept a single plain name as well.
_NAME_TUPLES = ("TRAIN", "TEST", "UNLABELED")


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

    # Semi-supervised training reads images without labels from these datasets (of any type; their
    # labels are never read) and, with SPLIT.PERCENT below 100, the rest of DATASETS.TRAIN.
    cfg.DATASETS.UNLABELED = ()
    cfg.DATASETS.SPLIT = CfgNode()
    # Percentage of DATASETS.TRAIN's images that keep their labels, and the draw's seed.
    cfg.DATASETS.SPLIT.PERCENT = 100.0
    cfg.DATASETS.SPLIT.SEED = 1
    # A split file instead of a draw: Unbiased Teacher's COCO_supervision.txt, or one written by
    # tools/split_coco.py; PERCENT and SEED choose the list in it.
    cfg.DATASETS.SPLIT.FILE = ""
    # Draw every class in proportion; draw so that a smaller percentage's images are in a larger's.
    cfg.DATASETS.SPLIT.STRATIFIED = False
    cfg.DATASETS.SPLIT.NESTED = False

    # Unreadable images that a process, or an evaluation, may skip; one more stops the run.
    cfg.DATALOADER.MAX_UNREADABLE = 100

    # Unlabelled images per step, of all processes together (labelled: IMS_PER_BATCH).
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 0
    # Batches whose gradients are averaged before a step.
    cfg.SOLVER.ACCUMULATE = 1

    cfg.INPUT.STRONG_AUG = CfgNode()
    # The strong view's changes: colour jitter, grayscale, blur, three erased rectangles.
    cfg.INPUT.STRONG_AUG.ENABLED = True
    cfg.INPUT.STRONG_AUG.JITTER_PROB = 0.8
    cfg.INPUT.STRONG_AUG.GRAY_PROB = 0.2
    cfg.INPUT.STRONG_AUG.BLUR_PROB = 0.5
    cfg.INPUT.STRONG_AUG.ERASE = True

    # Read by MODEL.META_ARCHITECTURE: TeacherStudentRCNN.
    cfg.SEMISUP = CfgNode()
    # The detector that student and teacher are: any registered meta-architecture with a backbone,
    # a proposal generator and RoI heads.
    cfg.SEMISUP.DETECTOR = "GeneralizedRCNN"
    # Steps on labelled images alone; then the teacher becomes a copy of the student.
    cfg.SEMISUP.BURN_IN_ITERS = 2000
    cfg.SEMISUP.EMA = CfgNode()
    # teacher = KEEP_RATE * teacher + (1 - KEEP_RATE) * student, every PERIOD steps.
    cfg.SEMISUP.EMA.KEEP_RATE = 0.9996
    cfg.SEMISUP.EMA.PERIOD = 1
    cfg.SEMISUP.PSEUDO = CfgNode()
    # A teacher's box is a pseudo label above this class score (delta), with both sides of at least
    # MIN_SIDE pixels of the resized image, and among the best MAX_PER_IMAGE of its image.
    cfg.SEMISUP.PSEUDO.SCORE_THRESH = 0.7
    cfg.SEMISUP.PSEUDO.MIN_SIDE = 2.0
    cfg.SEMISUP.PSEUDO.MAX_PER_IMAGE = 100
    # Read the labels that "unlabelled" images may have and write how good the pseudo labels are;
    # the student never sees them.
    cfg.SEMISUP.PSEUDO.COMPARE_WITH_TRUTH = False
    cfg.SEMISUP.LOSS_WEIGHT = CfgNode()
    # Weights of the losses on unlabelled images; 0 leaves a loss out. The thesis' alpha (CLS,
    # RPN_CLS), beta (BOX_REG, RPN_LOC) and gamma (IOU).
    cfg.SEMISUP.LOSS_WEIGHT.CLS = 4.0
    cfg.SEMISUP.LOSS_WEIGHT.RPN_CLS = 4.0
    cfg.SEMISUP.LOSS_WEIGHT.BOX_REG = 0.0
    cfg.SEMISUP.LOSS_WEIGHT.RPN_LOC = 0.0
    cfg.SEMISUP.LOSS_WEIGHT.IOU = 4.0
    cfg.SEMISUP.LOSS_WEIGHT.MASK = 0.0
    # The focal RoI classifier's gamma; 0 is plain cross-entropy.
    cfg.SEMISUP.FOCAL_GAMMA = 1.5
    # One backbone pass of the student over labelled and unlabelled images together, unless their
    # sizes differ so much that padding costs more than 10 %. Meant for GPUs; on two CPU cores it
    # took 6 % longer (docs/benchmarks.md). False: always one after the other.
    cfg.SEMISUP.MERGED_FORWARD = True
    # The teacher proposes as many boxes as in training (published code), not as at test.
    cfg.SEMISUP.TEACHER_TRAIN_PROPOSALS = False
    # Which models are evaluated: ("teacher", "student") or one of them.
    cfg.SEMISUP.EVAL = ("teacher", "student")

    cfg.MODEL.ROI_IOU_HEAD = CfgNode()
    # The IoU-classification branch: will this box, once refined, overlap its object enough?
    cfg.MODEL.ROI_IOU_HEAD.ENABLED = False
    # What it reads: "feature" (always) and, if named, class "logits" and box "deltas".
    cfg.MODEL.ROI_IOU_HEAD.INPUTS = ("feature", "logits", "deltas")
    cfg.MODEL.ROI_IOU_HEAD.HIDDEN_DIM = 1024
    # Between its two layers: "elu" or "none".
    cfg.MODEL.ROI_IOU_HEAD.ACTIVATION = "elu"
    # Training target: IoU above this (mu). Filter: predicted probability above this (theta).
    cfg.MODEL.ROI_IOU_HEAD.TRAIN_THRESH = 0.75
    cfg.MODEL.ROI_IOU_HEAD.TEST_THRESH = 0.4
    cfg.MODEL.ROI_IOU_HEAD.FILTER = True
    # "focal" (classification), "soft_focal" (the IoU itself as target), "smooth_l1" (regression).
    cfg.MODEL.ROI_IOU_HEAD.LOSS = "focal"
    cfg.MODEL.ROI_IOU_HEAD.FOCAL_GAMMA = 1.5

    # Checkpoints of a run that are kept, the latest, at least 2; 0: all. The final and the best
    # model are kept beside them.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0

    # "SGD", or "AdamW" (momentum is not read) for transformers.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Number format under SOLVER.AMP.ENABLED: "bf16", or "fp16" with loss scaling.
    cfg.SOLVER.AMP.DTYPE = "bf16"
    cfg.SOLVER.NONFINITE = CfgNode()
    # When a loss or a gradient is not finite: "stop", or "skip" the step, at most LIMIT times.
    cfg.SOLVER.NONFINITE.ACTION = "stop"
    cfg.SOLVER.NONFINITE.LIMIT = 10
    # Detectron2's SOLVER.CLIP_GRADIENTS.CLIP_TYPE ("value", or "norm" for every parameter by
    # itself) also takes "full_model": CLIP_VALUE bounds the norm of all gradients together.


def load_config(config_file: str, opts: list[str], *add_keys: Callable[[CfgNode], None]) -> CfgNode:
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
        datasets = loaded.get("DATASETS")
        for key in _NAME_TUPLES:
            if isinstance(datasets, dict) and key in datasets:
                datasets[key] = _as_name_tuple(datasets[key], f"{config_file}: DATASETS.{key}")
        values = read_values(loaded, cfg, config_file)
        _merge(lambda: cfg.merge_from_other_cfg(CfgNode(values)), config_file)
    opts = list(opts)
    _check_pairs(opts)
    for i, key in enumerate(opts[::2]):
        value = opts[2 * i + 1]
        if key in {f"DATASETS.{name}" for name in _NAME_TUPLES}:
            opts[2 * i + 1] = _as_name_tuple(value, f"command line: {key}")
        else:
            opts[2 * i + 1] = read_option(key, value, cfg, "command line")
    _merge(lambda: cfg.merge_from_list(opts), "command line")
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class _YamlFile(CfgNode):
    """Reads YAML as Detectron2, but refuses a key that is there twice, where the last would win."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        _refuse_repeats(yaml.compose(text, yaml.SafeLoader), filename)
        return io.StringIO(text)


def _refuse_repeats(node: yaml.Node | None, filename: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    names = [key.value for key, _ in node.value]
    for i, (key, value) in enumerate(node.value):
        if isinstance(key, yaml.ScalarNode) and key.value in names[:i]:
            raise ValueError(
                f"{filename}, line {key.start_mark.line + 1}: {key.value} is there twice, of which "
                "YAML takes the last alone; write one"
            )
        _refuse_repeats(value, filename)


def _read_yaml(config_file: str) -> dict:
    option = f"--config-file {config_file}"
    try:
        loaded = _YamlFile.load_yaml_with_base(config_file)
    except FileNotFoundError as error:
        missing = error.filename or str(error)
        if Path(missing).resolve() == Path(config_file).resolve():
            raise FileNotFoundError(f"--config-file: there is no file {config_file}") from error
        raise FileNotFoundError(
            f"{option}: there is no file {missing}, which a _BASE_ names. A relative _BASE_ is "
            "looked for beside the file that has it"
        ) from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{option} has a YAML tag that can run code, which is not read here; write the value "
            f"out: {error}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{option}: a _BASE_ or an alias (*) leads back to itself") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{option} is not a YAML mapping: {error}") from error
    except (OSError, AssertionError) as error:
        raise ValueError(f"{option} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{option} is not a mapping of keys")
    return loaded


def _check_pairs(opts: list[str]) -> None:
    for text in map(str, opts):
        if text.startswith("--"):
            raise ValueError(
                f"The command line ends with KEY VALUE pairs, but {text} comes after {opts[0]}: "
                "write all options before the first key"
            )
        key, equals, value = text.partition("=")
        if equals and re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*", key):
            raise ValueError(f"The command line needs KEY VALUE pairs: write {key} {value}")
    if len(opts) % 2:
        raise ValueError(f"The command line needs KEY VALUE pairs, got {opts}")


def _merge(merge: Callable[[], None], source: str) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{source}: {error.args[0] if error.args else error!r}") from error


def _as_name_tuple(value: str | list | tuple, key: str) -> tuple[str, ...]:
    if isinstance(value, str) and value.strip().startswith(("(", "[", '"', "'")):
        # Detectron2's own YAMLs write tuples as text, ("name",); a command line may say [name].
        with contextlib.suppress(ValueError, SyntaxError):
            value = literal_eval(value)
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(re.sub(r"^\((.*)\)$", r"[\1]", value.strip()))
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is a name or a list of names, got {value!r}")
    return tuple(names)
