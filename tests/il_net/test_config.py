"""Reading a configuration: what is merged, and what a mistake in it is answered with."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch

from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_without_a_file():
    cfg = load_config("", [])
    assert cfg.DATASETS.REGISTER == []
    assert cfg.DATASETS.CLASSES == ()
    assert cfg.SOLVER.AMP.DTYPE == "bf16"
    assert not cfg.is_frozen()


def test_bases_then_file_then_command_line(tmp_path):
    write(tmp_path, "SOLVER: {BASE_LR: 0.5, MAX_ITER: 5, IMS_PER_BATCH: 5}", "base.yaml")
    path = write(tmp_path, "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6, IMS_PER_BATCH: 6}")
    cfg = load_config(path, ["SOLVER.IMS_PER_BATCH", "7"])
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.IMS_PER_BATCH) == (0.5, 6, 7)


def test_further_keys_are_known_only_when_added(tmp_path):
    path = write(tmp_path, "MODEL: {GROIE: {PRE: rect}}")
    assert load_config(path, [], add_sbr_cnn_config).MODEL.GROIE.PRE == "rect"
    with pytest.raises(ValueError, match="GROIE"):
        load_config(path, [])


def test_two_configurations_share_nothing():
    first, second = load_config("", []), load_config("", [])
    first.DATASETS.REGISTER.append({"name": "x"})
    first.SOLVER.BASE_LR = 123.0
    assert second.DATASETS.REGISTER == []
    assert second.SOLVER.BASE_LR != 123.0


# ---- mistakes ----


def test_unknown_key_in_a_file_names_file_key_and_near_ones(tmp_path):
    path = write(tmp_path, "SOLVER: {MAX_ITERS: 6}")
    with pytest.raises(ValueError) as error:
        load_config(path, [])
    message = str(error.value)
    assert path in message
    assert "SOLVER.MAX_ITERS" in message
    assert "Did you mean SOLVER.MAX_ITER" in message


def test_unknown_key_on_the_command_line_names_near_ones():
    with pytest.raises(ValueError) as error:
        load_config("", ["SOLVER.MAX_ITERS", "6"])
    message = str(error.value)
    assert "command line" in message
    assert "SOLVER.MAX_ITERS" in message
    assert "Did you mean SOLVER.MAX_ITER" in message


def test_unknown_key_without_a_like_one_has_no_hint(tmp_path):
    path = write(tmp_path, "QQQ_ZZZ: 1")
    with pytest.raises(ValueError, match="QQQ_ZZZ") as error:
        load_config(path, [])
    assert "Did you mean" not in str(error.value)


def test_unknown_node_in_a_file_and_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="SOLVERS"):
        load_config(write(tmp_path, "SOLVERS: {BASE_LR: 0.1}"), [])
    with pytest.raises(ValueError, match=r"SOLVERS\.BASE_LR"):
        load_config("", ["SOLVERS.BASE_LR", "0.1"])


@pytest.mark.parametrize("value", ["many", "[1, 2]", "1.5"])
def test_value_of_the_wrong_type_names_the_key(tmp_path, value):
    with pytest.raises(ValueError, match="MAX_ITER"):
        load_config(write(tmp_path, f"SOLVER: {{MAX_ITER: {value}}}"), [])
    with pytest.raises(ValueError, match="MAX_ITER"):
        load_config("", ["SOLVER.MAX_ITER", value])


@pytest.mark.parametrize(
    ("key", "value", "rest"),
    [
        ("MODEL.MASK_ON", "true", "True or False, got 'true'; write True"),
        ("MODEL.MASK_ON", "0", "True or False, got 0; write False"),
        ("SOLVER.MAX_ITER", "1e5", "a whole number, got 100000.0; write 100000"),
        ("SOLVER.MAX_ITER", "None", "a whole number, got None; write a number as 40000"),
        ("SOLVER.MAX_ITER", "[500]", "a whole number, got [500]; write 500"),
        ("SOLVER.BASE_LR", "0,02", "a number, got '0,02'; write 0.02"),
        ("SOLVER.BASE_LR", "0,5", "a number, got (0, 5); write 0.5"),
        ("SOLVER.BASE_LR", "True", "a number, got True; write a number as 0.001"),
        ("SOLVER.STEPS", "(100)", "a list of numbers, got 100; write [100]"),
        ("SOLVER.STEPS", "['6e4']", "a list of numbers, got ['6e4']; write a list as [30000]"),
        ("SOLVER.STEPS", "((1, 2),)", "a list of numbers, got ((1, 2),); write a list as [30000]"),
        ("MODEL.RPN.IN_FEATURES", "p2", "a list of texts, got 'p2'; write ['p2']"),
        ("MODEL.RPN.IN_FEATURES", "[p2,p3]", "a list of texts, got '[p2,p3]'; write ['p2', 'p3']"),
        ("MODEL.FPN.IN_FEATURES", "[1]", "a list of texts, got [1]; write a list as ['res2']"),
        ("OUTPUT_DIR", "2017", "a text, got 2017; write \"'2017'\""),
        ("SOLVER.AMP", "True", "a group of keys, got 'True'; write keys in it, ENABLED for one"),
    ],
)
def test_wrong_type_says_what_to_write(key, value, rest):
    with pytest.raises(ValueError) as error:
        load_config("", [key, value])
    assert str(error.value) == f"command line: {key} is {rest}"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("MODEL: {MASK_ON: 'yes'}", "MODEL.MASK_ON is True or False, got 'yes'; write True"),
        ("SOLVER: {MAX_ITER: }", "SOLVER.MAX_ITER is a whole number, got None; write a number"),
        ("SOLVER: {STEPS: 100}", "SOLVER.STEPS is a list of numbers, got 100; write [100]"),
        ("SOLVER: {STEPS: [6e4]}", "SOLVER.STEPS is a list of numbers, got ['6e4']; write a list"),
        ("SOLVER: {BASE_LR: [0.1]}", "SOLVER.BASE_LR is a number, got [0.1]; write 0.1"),
        ("SOLVER: 0.1", "SOLVER is a group of keys, got 0.1; write keys in it, "),
        ("SOLVER:", "SOLVER is a group of keys, got None; write keys in it, "),
        ("OUTPUT_DIR: 2017-01-01", "OUTPUT_DIR is a text, got datetime.date(2017, 1, 1); write a"),
        ("1: 2", "there is no configuration key 1."),
        ("DATASETS: 5", "DATASETS is a group of keys, got 5; write keys in it, "),
    ],
)
def test_wrong_type_in_a_file_says_what_to_write(tmp_path, text, rest):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(path, [])
    assert str(error.value).startswith(f"{path}: {rest}")


def test_what_a_command_line_says_is_right_and_works():
    """The spellings that the messages above tell to write."""
    opts = [
        *("MODEL.MASK_ON", "True", "SOLVER.MAX_ITER", "100000", "SOLVER.BASE_LR", "0.02"),
        *("SOLVER.STEPS", "[100]", "MODEL.RPN.IN_FEATURES", "['p2']", "OUTPUT_DIR", "'2017'"),
    ]
    cfg = load_config("", opts)
    assert (cfg.MODEL.MASK_ON, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (True, 100000, 0.02)
    assert (cfg.SOLVER.STEPS, cfg.MODEL.RPN.IN_FEATURES, cfg.OUTPUT_DIR) == ((100,), ["p2"], "2017")


def test_none_where_the_default_is_none_and_flat_anchors():
    cfg = load_config("", ["SOLVER.WEIGHT_DECAY_BIAS", "0.1"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.1
    opts = ["SOLVER.WEIGHT_DECAY_BIAS", "None", "MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64.5]"]
    cfg = load_config("", opts)
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [32, 64.5]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("BASE_LR", "SOLVER.BASE_LR"),  # in no node
        ("MODEL.MAX_ITER", "SOLVER.MAX_ITER"),  # in another
        ("solver.max_iter", "SOLVER.MAX_ITER"),
        ("SOLVERS", "SOLVER"),
        ("SOLVER.MAX_ITER.X", "SOLVER.MAX_ITER"),
    ],
)
def test_unknown_key_that_is_nearly_known(key, near):
    with pytest.raises(ValueError, match=rf"no configuration key {key}\. Did you mean {near}\b"):
        load_config("", [key, "1"])


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (["MODEL.WEIGHTS", "x", "--eval-only"], ["--eval-only", "MODEL.WEIGHTS", "before"]),
        (["MODEL.WEIGHTS", "x", "--num-gpus", "2"], ["--num-gpus", "before"]),
        (["SOLVER.MAX_ITER=5"], ["write SOLVER.MAX_ITER 5"]),
        (["SOLVER.MAX_ITER=5", "SEED=1"], ["write SOLVER.MAX_ITER 5"]),
    ],
)
def test_what_is_not_a_pair_on_the_command_line(opts, parts):
    with pytest.raises(ValueError, match="KEY VALUE") as error:
        load_config("", opts)
    assert [part for part in parts if part not in str(error.value)] == []


def test_an_equals_sign_in_a_value_is_none_of_that():
    assert load_config("", ["OUTPUT_DIR", "runs/lr=0.1"]).OUTPUT_DIR == "runs/lr=0.1"


@pytest.mark.parametrize("text", ["SEED: 1\nSEED: 2", "MODEL: {A: 1}\nSEED: 1\nMODEL: {B: 2}"])
def test_a_key_twice_is_refused(tmp_path, text):
    base = write(tmp_path, text, "base.yaml")
    for path in (base, write(tmp_path, "_BASE_: base.yaml")):
        with pytest.raises(ValueError, match=rf"base\.yaml, line \d: {text[:4]}\w* is there twice"):
            load_config(path, [])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        pytest.param(b"_BASE_: config.yaml", "_BASE_", id="own base"),
        pytest.param(b"SEED: &a [*a]", "SEED", id="alias in itself"),
        pytest.param(b"OUTPUT_DIR: \xff\xfe", "YAML", id="not UTF-8"),
        pytest.param(b"OUTPUT_DIR: \x00", "YAML", id="a zero"),
        pytest.param(b"SEED: !!python/object/apply:os.getcwd []", "run code", id="code"),
        pytest.param(b"_BASE_: ''", "config.yaml", id="a folder as base"),
    ],
)
def test_a_file_that_cannot_be_read_names_it(tmp_path, text, part):
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        load_config(str(path), [])
    assert str(path) in str(error.value) and part in str(error.value)


def test_a_base_of_another_shape(tmp_path):
    write(tmp_path, "SOLVER: 5", "base.yaml")
    path = write(tmp_path, "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 5}")
    with pytest.raises(ValueError, match="SOLVER"):
        load_config(path, [])


@pytest.mark.parametrize("opts", [["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "5", "--resume"]])
def test_key_without_a_value(opts):
    with pytest.raises(ValueError, match="KEY VALUE") as error:
        load_config("", opts)
    assert opts[-1] in str(error.value)


def test_missing_file_is_named_with_the_option(tmp_path):
    path = str(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="--config-file") as error:
        load_config(path, [])
    assert path in str(error.value)


def test_missing_base_is_named_with_the_file_that_asks_for_it(tmp_path):
    path = write(tmp_path, "_BASE_: gone.yaml")
    with pytest.raises(FileNotFoundError) as error:
        load_config(path, [])
    assert path in str(error.value)
    assert "gone.yaml, which a _BASE_ names" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("just words", id="scalar"),
        pytest.param("- a\n- b", id="list"),
        pytest.param("SOLVER: [", id="broken YAML"),
        pytest.param("DATASETS:", id="empty node"),
        pytest.param("DATASETS: {TRAIN: }", id="missing name"),
        pytest.param("DATASETS: {TRAIN: 2017}", id="name that YAML reads as a number"),
    ],
)
def test_malformed_file_is_a_value_error_that_names_it(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(path, [])
    assert path in str(error.value)


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        load_config(str(tmp_path), [])
    assert str(tmp_path) in str(error.value)


# ---- names of datasets ----


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("leaves", ("leaves",)),
        ("'leaves'", ("leaves",)),
        ("[leaves]", ("leaves",)),
        ("[leaves, spots]", ("leaves", "spots")),
        ("('leaves',)", ("leaves",)),
        ("('leaves', 'spots')", ("leaves", "spots")),
        ("[]", ()),
        ("()", ()),
        ("coffee-leaf.2017_train", ("coffee-leaf.2017_train",)),
    ],
)
def test_names_in_a_file(tmp_path, key, text, expected):
    cfg = load_config(write(tmp_path, f"DATASETS:\n  {key}: {text}\n"), [])
    assert cfg.DATASETS[key] == expected


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("leaves", ("leaves",)),
        ("('leaves',)", ("leaves",)),
        ("['leaves', 'spots']", ("leaves", "spots")),
        ("()", ()),
        ("coffee-leaf.2017_train", ("coffee-leaf.2017_train",)),
        ("2017", ("2017",)),
    ],
)
def test_names_on_the_command_line(key, value, expected):
    opts = [f"DATASETS.{key}", value]
    assert load_config("", opts).DATASETS[key] == expected
    assert opts == [f"DATASETS.{key}", value]  # the caller's list stays as it is


# ---- device ----


def test_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config("", []).MODEL.DEVICE == "cpu"
    assert load_config("", ["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "typed", ["leaves", "[leaves]", "('leaves',)", "(leaves)", '["leaves"]', "[leaves, more]"]
)
def test_dataset_names_on_the_command_line(typed):
    names = load_config("", ["DATASETS.TRAIN", typed]).DATASETS.TRAIN
    assert names == (("leaves", "more") if "more" in typed else ("leaves",))


def test_whole_numbers_do_for_floats(tmp_path):
    opts = ["DATASETS.SPLIT.PERCENT", "10", "SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "7"]
    for cfg in (
        load_config("", opts),
        load_config(
            write(tmp_path, "DATASETS: {SPLIT: {PERCENT: 10}}\nSOLVER: {BASE_LR: 1, MAX_ITER: 7}"),
            [],
        ),
    ):
        assert cfg.DATASETS.SPLIT.PERCENT == 10.0 and type(cfg.SOLVER.BASE_LR) is float
        assert type(cfg.SOLVER.MAX_ITER) is int


def test_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_config("", []).MODEL.DEVICE == "cuda"
    assert load_config("", ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"


def test_config_of_a_run_can_be_read_again(tmp_path):
    cfg = load_config("", ["DATASETS.TRAIN", "leaves"], add_sbr_cnn_config)
    cfg.DATASETS.REGISTER = [{"name": "leaves", "type": "coco", "json": "a", "images": "b"}]
    cfg.DATASETS.CLASSES = ("leaf", "spot")
    path = write(tmp_path, cfg.dump())
    again = load_config(path, [], add_sbr_cnn_config)
    # YAML has no tuples inside lists, so the two are compared as JSON.
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(cfg))
