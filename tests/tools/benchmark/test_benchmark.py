"""The benchmark's work is the same for all models, its arithmetic is right, its files readable."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Boxes, pairwise_iou

from il_net.benchmark.semisup_timing import PHASES
from il_net.benchmark.timing import Subject, count_boxes, differences, in_turn
from il_net.benchmark.timing_report import compare
from il_net.benchmark.workload import MODES, Workload, class_logits, make_workload
from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[3]
CONFIGS = REPO / "configs" / "sbr_cnn"
MASK, LOOP, CASCADE, BOX_ONLY = (
    str(CONFIGS / f"{name}_r50_fpn_1x.yaml")
    for name in ("mask_rcnn", "r3_cnn", "cascade_mask_rcnn", "faster_rcnn")
)
SEMISUP = str(REPO / "configs" / "il_net" / "il_net_r50_fpn_coco10.yaml")
SEPARATE = f"{SEMISUP}:SEMISUP.MERGED_FORWARD=False"
SIZE = (64, 96)
# Narrow layers; everything that decides how many boxes there are is the configurations' own.
NARROW = [
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "1"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "1"),
]
# The objects of small pictures are small.
TINY_BOXES = ["SEMISUP.PSEUDO.MIN_SIDE", "0.0"]
SHORT = ["--size", "64x96", "--device", "cpu", "--opts", *NARROW]


def make_subject(workload: Workload, file: str, *opts: str, **kwargs) -> Subject:
    opts = [*NARROW, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "cpu", *opts]
    return Subject("x", load_config(file, opts, add_sbr_cnn_config), workload, **kwargs)


# ---- the work ----


@pytest.mark.parametrize("size", [SIZE, (800, 1216)])
def test_proposals_leave_no_doubt_who_is_positive(size):
    work = make_workload(size)
    assert len(work.truths) == 20
    for mode, count in (("inference", 1000), ("train", 2000)):
        boxes = work.proposals[mode]
        best = pairwise_iou(Boxes(work.truths), Boxes(boxes)).amax(dim=0)
        assert (best >= 0.82 - 1e-4).sum() == count / 4
        # Cascade and loops ask for 0.5, 0.6 and 0.7: the same boxes are positive.
        assert ((best >= 0.5) & (best < 0.82 - 1e-4)).sum() == 0
        assert ((best >= 0.3 - 1e-4) & (best < 0.5)).sum() >= count / 4
        assert boxes.shape == (count, 4)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert (boxes[:, 2:] <= torch.tensor([size[1], size[0]]) + 1e-3).all()


def test_objects_have_sizes_from_small_to_large_and_are_ellipses():
    work = make_workload((800, 1216))
    extent = work.truths[:, 2:] - work.truths[:, :2]
    sides = extent.prod(dim=1).sqrt()
    assert 16 <= sides.min() < 32  # COCO's small objects
    assert 96 < sides.max() <= 400  # and large ones
    # An ellipse fills pi / 4 of its box, wherever the pixels are many.
    fill = work.masks.sum(dim=(1, 2)) / extent.prod(dim=1)
    assert fill[sides > 64].sub(math.pi / 4).abs().max() < 0.01
    assert torch.equal(make_workload((800, 1216)).masks, work.masks)


@pytest.mark.parametrize(("threshold", "low", "high"), [(0.05, 300, 500), (0.001, 3000, 4500)])
@pytest.mark.parametrize("nms", [0.3, 0.5])
def test_full_size_work_gives_a_hundred_detections(threshold, low, high, nms):
    """Without a model: the thresholds of Mask R-CNN and of R3-CNN, and Grid R-CNN's NMS."""
    boxes = make_workload((800, 1216)).proposals["inference"]
    scores = class_logits(80).softmax(dim=1)
    assert low < (scores[:, :-1] > threshold).sum() < high
    size = (800, 1216)
    found, _ = fast_rcnn_inference_single_image(boxes, scores, size, threshold, nms, 100)
    assert len(found) == 100


@pytest.mark.parametrize(
    ("file", "opts", "boxes", "masks", "detected"),
    [
        (MASK, (), 1, 1, 1),
        (BOX_ONLY, (), 1, 0, 0),
        (CASCADE, (), 3, 1, 1),  # masks on the first stage's positives
        (LOOP, (), 3, 3, 1),
        (LOOP, ("MODEL.ROI_LOOP_HEAD.ORDER", "aab"), 3, 3, 1),
    ],
)
def test_every_head_gets_what_is_promised(workload, file, opts, boxes, masks, detected):
    subject = make_subject(workload, file, *opts)
    for mode in MODES:
        assert subject.run(mode) > 0
    expected = {
        "inference": {"box": [1000] * boxes, "detections": [100]},
        "train": {"box": [512] * boxes},
    }
    if masks:
        expected["inference"]["mask"] = [100] * detected
        expected["train"]["mask"] = [128] * masks
    assert subject.seen == expected
    assert [differences(mode, subject.seen[mode], 1) for mode in MODES] == [[], []]


def test_two_pictures_are_twice_the_work(workload):
    subject = make_subject(workload, MASK, images=2)
    subject.run("train")
    assert subject.seen["train"] == {"box": [1024], "mask": [256]}
    assert differences("train", subject.seen["train"], 2) == []


def test_bf16_does_the_same_work(workload):
    subject = make_subject(workload, MASK, amp_dtype=torch.bfloat16)
    for mode in MODES:
        subject.run(mode)
        assert differences(mode, subject.seen[mode], 1) == []


def test_a_model_that_works_less_is_told(workload):
    less = ("TEST.DETECTIONS_PER_IMAGE", "7", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64")
    subject = make_subject(workload, LOOP, *less)
    for mode in MODES:
        subject.run(mode)
    assert differences("inference", subject.seen["inference"], 1) == [
        "mask [7] instead of 100",
        "detections [7] instead of 100",
    ]
    told = differences("train", subject.seen["train"], 1)
    assert told == ["box [64, 64, 64] instead of 512", "mask [16, 16, 16] instead of 128"]


def test_one_loop_of_several_that_differs_is_told_and_a_missing_count_too():
    assert differences("train", {"box": [512, 511]}, 1) == ["box [512, 511] instead of 512"]
    assert len(differences("inference", {}, 1)) == 2


def test_all_models_find_the_same_whatever_their_threshold(workload):
    """Mask R-CNN keeps scores from 0.05 on, R3-CNN from 0.001: the best 100 are the same."""
    found = []
    for file in (MASK, LOOP, CASCADE):
        subject = make_subject(workload, file)
        subject.model.eval()
        with torch.no_grad():
            found.append(subject.model(subject.inputs)[0]["instances"])
    for other in found[1:]:
        assert torch.equal(other.pred_classes, found[0].pred_classes)
        assert torch.allclose(other.scores, found[0].scores, atol=1e-5)
        assert torch.allclose(other.pred_boxes.tensor, found[0].pred_boxes.tensor, atol=1e-3)


def test_replaced_layers_still_run(workload, count_calls):
    subject = make_subject(workload, LOOP)
    heads = subject.model.roi_heads
    layers = {
        "rpn": subject.model.proposal_generator.rpn_head,
        "classes": heads.pairs["a"].box_predictor.cls_score,
        "deltas": heads.pairs["a"].box_predictor.bbox_pred,
    }
    calls = count_calls(layers)
    subject.run("inference")
    assert calls == {"rpn": 1, "classes": 3, "deltas": 3}
    subject.run("train")
    assert calls == {"rpn": 2, "classes": 6, "deltas": 6}


def test_the_training_step_is_whole_but_changes_nothing(workload):
    subject = make_subject(workload, LOOP)
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    subject.run("train")
    first = subject.storage.latest()["total_loss"][0]
    assert math.isfinite(first)
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    assert subject.parameters == sum(p.numel() for p in trained)
    state = subject.step.optimizer.state
    assert all(state[p]["momentum_buffer"] is not None for p in trained)  # SGD did its step


def test_backbone_activations_are_those_of_a_normalised_network(workload):
    """Without statistics, the 16 blocks' sums would multiply the variance by 2 each time."""
    subject = make_subject(workload, MASK)
    subject.model.eval()
    seen = []
    for module in subject.model.backbone.modules():
        if hasattr(module, "running_var"):
            module.register_forward_hook(lambda m, a, output: seen.append(output.var()))
    with torch.no_grad():
        subject.model(subject.inputs)
    assert len(seen) == 53  # a ResNet-50's
    assert torch.stack(seen).sub(1).abs().max() < 0.2


def test_counters_leave_no_trace(workload):
    subject = make_subject(workload, MASK)
    with count_boxes(subject.model) as counts:
        pass
    subject.run("inference")
    assert counts == {}
    first = dict(subject.seen["inference"])
    subject.run("inference")
    assert subject.seen["inference"] == first  # counted once


# ---- the arithmetic ----


def test_models_are_run_in_turn():
    calls = []

    def run(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = in_turn([lambda n=n: run(n) for n in "ABC"], warmup=1, repeat=2)
    assert "".join(calls) == "ABCABCABC"
    assert times == [[4, 7], [5, 8], [6, 9]]  # without the first round


def test_ratios_of_given_times():
    first = {"parameters": 10, "train": {"times": [1.0, 2.0, 3.0], "peak_bytes": 100}}
    second = {"parameters": 25, "train": {"times": [2.0, 3.0, 12.0], "peak_bytes": 150}}
    rows = compare([first, second])
    assert rows[1]["parameters_ratio"] == 2.5
    train = rows[1]["train"]
    assert (train["median"], train["min"], train["max"]) == (3, 2, 12)
    assert train["ratio"] == 1.5  # 3 / 2
    assert (train["ratio_min"], train["ratio_max"]) == (1.5, 4)  # of 2, 1.5, 4
    assert train["peak_ratio"] == 1.5
    own = rows[0]["train"]
    assert (own["ratio"], own["ratio_min"], own["ratio_max"]) == (1, 1, 1)
    assert "median" not in first["train"]  # the input is left alone


def test_memory_that_was_not_measured_has_no_ratio(tool):
    row = {"label": "x", "parameters": 1, "inference": {"times": [0.5], "peak_bytes": None}}
    row["inference"] |= {"seen": {"box": [9]}, "differs": ["box [9] instead of 1000"]}
    (compared,) = compare([row])
    assert compared["inference"]["peak_ratio"] is None
    machine = {"device": "d", "threads": 1, "torch": "2", "date": "today"}
    settings = {"dtype": "fp32", "size": [64, 96], "images": 1, "repeat": 1}
    text = tool.render({"machine": machine, "settings": settings, "configs": [compared]})
    assert "| x | 1 | 1.00 | 500.0 (500.0-500.0) | 1.00 (1.00-1.00) | not measured |  |" in text
    assert "**box [9] instead of 1000**" in text


def test_shares_and_ratios_of_given_phases(tool):
    def row(label: str, *milliseconds: float) -> dict:
        rounds = [[scale * 1e-3 * ms for ms in milliseconds] for scale in (1, 5, 1)]
        measured = {
            "times": [sum(seconds) for seconds in rounds],
            "phases": [dict(zip(PHASES, seconds, strict=True)) for seconds in rounds],
            **{"peak_bytes": None, "seen": {"pseudo boxes": [20]}, "differs": []},
        }
        return {"label": label, "parameters": 1, "semisup": measured}

    rows = compare([row("a", 2, 1, 3, 2.5, 0.5, 0.6, 0.4), row("b", 1, 4, 1, 1, 1, 1, 1)])
    machine = {"device": "d", "threads": 1, "torch": "2", "date": "today"}
    settings = {"dtype": "fp32", "size": [64, 96], "images": 1, "repeat": 3}
    text = tool.render({"machine": machine, "settings": settings, "configs": rows})
    for line in (
        "| b | pseudo boxes 20 |",
        "| phase | a, ms | share | ratio | b, ms | share | ratio |",
        "| data | 2.0 | 20.0% | 1.00 | 1.0 | 10.0% | 0.50 |",
        "| teacher | 1.0 | 10.0% | 1.00 | 4.0 | 40.0% | 4.00 |",
        "| update | 0.5 | 5.0% | 1.00 | 1.0 | 10.0% | 2.00 |",
        "| step without data | 8.0 | 80.0% | 1.00 | 9.0 | 90.0% | 1.12 |",
        "| step | 10.0 | 100.0% | 1.00 | 10.0 | 100.0% | 1.00 |",
    ):
        assert line in text.splitlines()


# ---- the command line ----


@pytest.mark.parametrize(
    ("text", "file", "opts", "label"),
    [
        ("a/b.yaml", "a/b.yaml", [], "b"),
        ("a/b.yaml:X.ORDER=aab", "a/b.yaml", ["X.ORDER", "aab"], "b ORDER=aab"),
        (
            "b.yaml:X.IOUS=(0.5, 0.6):Y.W=s3://x=1",
            "b.yaml",
            ["X.IOUS", "(0.5, 0.6)", "Y.W", "s3://x=1"],
            "b IOUS=(0.5, 0.6) W=s3://x=1",
        ),
    ],
)
def test_a_config_with_keys_of_its_own(tool, text, file, opts, label):
    assert tool.split_config(text) == (file, opts)
    assert tool.make_label(text) == label


def test_own_keys_win_over_those_for_all(tool):
    key = "MODEL.ROI_LOOP_HEAD.ORDER"
    cfg = tool.load(f"{LOOP}:{key}=aab", [key, "aba", "SEED", "3"], "cpu")
    assert (cfg.MODEL.ROI_LOOP_HEAD.ORDER, cfg.SEED) == ("aab", 3)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


def test_tables_and_json(tool, tmp_path, capsys):
    output = tmp_path / "bench.json"
    deeper = f"{LOOP}:MODEL.ROI_LOOP_HEAD.ORDER=aab"
    tool.main([MASK, deeper, "--repeat", "2", "--output", str(output), *SHORT])
    report = json.loads(output.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert report["settings"]["size"] == list(SIZE)
    mask, loop = report["configs"]
    assert (mask["config"], loop["config"]) == (MASK, deeper)
    for row in (mask, loop):
        for mode in MODES:
            assert len(row[mode]["times"]) == 2
            assert row[mode]["differs"] == []
            assert row[mode]["peak_bytes"] is None
    assert loop["parameters_ratio"] == loop["parameters"] / mask["parameters"]
    lines = capsys.readouterr().out.splitlines()
    numbers = next(line for line in lines if line.startswith("| r3_cnn_r50_fpn_1x ORDER=aab | "))
    assert f"| {loop['parameters']:,} |" in numbers
    assert f"{loop['train']['median'] * 1000:.1f} (" in numbers
    assert f"| {loop['inference']['ratio']:.2f} (" in numbers
    # Rows of a table have as many cells as its header.
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert tables[:4] == [12] * 4
    assert tables[4:] == [4] * 4


def test_one_mode_alone(tool, tmp_path, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--modes", "inference", "--repeat", "1", "--output", str(output)]
    tool.main([BOX_ONLY, *arguments, *SHORT])
    (row,) = json.loads(output.read_text())["configs"]
    assert "train" not in row
    assert "training step, ms" not in capsys.readouterr().out


def test_the_semi_supervised_step_in_phases(tool, tmp_path, capsys):
    output = tmp_path / "bench.json"
    options = ["--images", "2", "--repeat", "2", "--output", str(output), *SHORT]
    tool.main([SEMISUP, SEPARATE, *options, "INPUT.MIN_SIZE_TRAIN", "(64,)", *TINY_BOXES])
    report = json.loads(output.read_text())
    assert report["settings"]["modes"] == ["semisup"]
    merged, separate = report["configs"]
    for row in (merged, separate):
        assert "train" not in row
        assert row["parameters_ratio"] == 1
        measured = row["semisup"]
        assert measured["differs"] == []
        assert measured["seen"]["pseudo boxes"] == [20, 20]
        for total, phases in zip(measured["times"], measured["phases"], strict=True):
            assert list(phases) == list(PHASES)
            assert 0 < sum(phases.values()) <= total
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| phase | "))
    table = [line.strip("| ").split(" | ") for line in lines[start:]]
    assert [row[0] for row in table[2:]] == [*PHASES, "step without data", "step"]
    assert {len(row) for row in table} == {7}
    label = "il_net_r50_fpn_coco10 MERGED_FORWARD=False"
    assert table[0][4] == f"{label}, ms"
    assert table[-1][1] == f"{merged['semisup']['median'] * 1000:.1f}"
    assert table[-1][6] == f"{separate['semisup']['ratio']:.2f}"


def test_a_looped_student_has_its_loops_counted(tool, tmp_path):
    """Any detector of this project: SBR-CNN's heads, in the student and in the teacher."""
    output = tmp_path / "bench.json"
    keys = ["MODEL.META_ARCHITECTURE=TeacherStudentRCNN", "SEMISUP.LOSS_WEIGHT.MASK=1.0"]
    options = ["--repeat", "1", "--output", str(output), *SHORT, *TINY_BOXES]
    tool.main([":".join([LOOP, *keys]), *options])
    (row,) = json.loads(output.read_text())["configs"]
    assert row["semisup"]["differs"] == []
    assert row["semisup"]["seen"] == {
        "teacher box": [1000] * 3,
        "teacher mask": [20],
        "student box": [1024] * 3 + [512] * 3,
        "student mask": [256] * 3 + [128] * 3,
        "pseudo boxes": [20],
    }


def test_profile_names_operators(tool, capsys):
    tool.main([BOX_ONLY, "--modes", "inference", "--profile", *SHORT])
    text = capsys.readouterr().out
    assert "faster_rcnn_r50_fpn_1x, inference" in text
    assert "aten::" in text
    assert "Self CPU time total" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "CONFIG"),
        ([MASK, "--size", "800"], "--size: needs HEIGHTxWIDTH"),
        ([MASK, "--size", "8x800"], "--size: needs"),
        ([MASK, "--repeat", "0"], "--repeat: needs a whole number"),
        ([MASK, "--warmup", "-1"], "--warmup"),
        ([MASK, "--modes", "train,test"], "--modes: needs some of inference,train"),
        ([MASK, "--modes", "train,semisup"], "or semisup alone, got 'train,semisup'"),
        ([MASK, "--dtype", "fp16"], "--dtype"),
        ([MASK, "--device", "cuda"], "--device: cuda was asked for"),
        ([MASK, "--opts", "SEED"], "--opts: needs KEY VALUE"),
        ([MASK, "--output", "not there/bench.json"], "--output: there is no folder"),
    ],
)
def test_mistakes_name_the_argument(tool, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gone.yaml", "CONFIG gone.yaml: there is no file"),
        (f"{MASK}:ORDER", "write FILE or FILE:KEY=VALUE"),
        (f"{MASK}:MODEL.MASC_ON=True", "MASC_ON=True: .*MODEL.MASK_ON"),
        (f"{LOOP}:MODEL.ROI_LOOP_HEAD.ORDER=b", "ORDER=b: MODEL.ROI_LOOP_HEAD.ORDER needs"),
        (f"{MASK}:MODEL.META_ARCHITECTURE=ProposalNetwork", "CONFIG .*got ProposalNetwork"),
    ],
)
def test_mistakes_in_a_config_name_it(tool, text, expected):
    with pytest.raises(SystemExit, match=expected):
        tool.main([text, *SHORT])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([MASK, "--modes", "semisup"], f"CONFIG {MASK}: mode semisup needs .*got GeneralizedRCNN"),
        ([SEMISUP, MASK], f"CONFIG {MASK}: mode semisup needs"),
        ([SEMISUP, "--modes", "train"], f"CONFIG {SEMISUP}: .* in mode semisup alone, got --modes"),
    ],
)
def test_modes_that_do_not_fit_name_the_config(tool, monkeypatch, arguments, expected):
    monkeypatch.setattr(tool, "make_workload", None)  # refused before anything is built
    with pytest.raises(SystemExit, match=expected):
        tool.main([*arguments, *SHORT])


@pytest.mark.slow
def test_memory_on_the_cpu_is_a_process_of_its_own(tmp_path):
    """A training step with four pictures needs more than inference with one."""
    output = tmp_path / "bench.json"
    command = [sys.executable, str(REPO / "tools" / "benchmark.py"), MASK, "--memory"]
    command += ["--repeat", "1", "--images", "4", "--threads", "1", "--output", str(output)]
    subprocess.run([*command, *SHORT], check=True, stdout=subprocess.DEVNULL, timeout=300)
    (row,) = json.loads(output.read_text())["configs"]
    peaks = [row[mode]["peak_bytes"] for mode in MODES]
    assert 4 * row["parameters"] < peaks[0] < peaks[1] < 4 * 2**30


def test_a_failed_memory_process_is_told(tool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")  # a program that fails
    with pytest.raises(SystemExit, match=f"--memory: the process for CONFIG {MASK} failed"):
        tool.main([MASK, "--memory", *SHORT])


def test_memory_on_the_gpu_is_counted_without_the_other_models(workload, monkeypatch):
    """Others hold 1000 bytes; this model holds 100 before its step and 300 after it."""
    subject = make_subject(workload, BOX_ONLY)
    allocated = iter([1100, 1300, 1300, 1300])
    peaks = iter([1500, 1400])
    for name, fake in {
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: next(peaks),
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    subject.device, subject.resident = torch.device("cuda"), 100
    subject.run("train")
    assert (subject.resident, subject.peak_bytes["train"]) == (300, 500)
    subject.run("train")
    assert subject.peak_bytes["train"] == 500  # the highest of all runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_the_gpu_is_without_the_other_models(workload):
    """The same model, alone and beside others that have run: the same peak."""
    peaks = []
    others = []
    for _ in range(2):
        subject = make_subject(workload, LOOP, "MODEL.DEVICE", "cuda")
        for mode in MODES:
            in_turn([lambda m=mode, s=subject: s.run(m)], warmup=1, repeat=2)
        assert [differences(mode, subject.seen[mode], 1) for mode in MODES] == [[], []]
        peaks.append(subject.peak_bytes)
        others.append(subject)
    assert peaks[0]["train"] > 12 * subject.parameters  # weights, gradients and momentum
    for mode in MODES:
        assert peaks[1][mode] == pytest.approx(peaks[0][mode], rel=0.02)
