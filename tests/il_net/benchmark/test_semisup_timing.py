"""The benchmark's semi-supervised step: what is found, what is counted, and whose time is whose."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import cv2
import pytest
import torch
from detectron2.config import CfgNode

from il_net.benchmark import semisup_timing
from il_net.benchmark.semisup_timing import (
    PHASES,
    PhaseClock,
    SemisupSubject,
    strong_view,
    write_record,
)
from il_net.benchmark.workload import SEMISUP, Workload, make_workload
from il_net.config import load_config
from il_net.modeling import teacher_student

SIZE = (128, 160)
# Narrow layers; what decides how many boxes there are is the configuration's own.
NARROW = [
    *("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 80),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 1, "MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 1),
    *("INPUT.MIN_SIZE_TRAIN", [128], "MODEL.ROI_IOU_HEAD.ENABLED", True),
]
SEPARATE = ("SEMISUP.MERGED_FORWARD", False)
MASKS = ("MODEL.MASK_ON", True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload(SIZE)


def make_cfg(*opts) -> CfgNode:
    return load_config("", [*NARROW, *opts])


def make_subject(workload: Workload, *opts, images: int = 1) -> SemisupSubject:
    return SemisupSubject("x", make_cfg(*opts), workload, images=images)


# ---- the clock ----


def fake_clock(monkeypatch) -> Callable[[float], None]:
    """A clock that stands still; the function returned moves it."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(semisup_timing, "time", clock)

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_phase_counts_without_those_inside_it(monkeypatch):
    wait = fake_clock(monkeypatch)
    clock = PhaseClock(lambda: None)
    with clock.phase("student"):
        wait(1)
        with clock.phase("teacher"):
            wait(2)
            for _ in range(2):
                with clock.phase("logging"):
                    wait(4)
        wait(16)
    with clock.phase("data"):
        wait(32)
    spent = {name: seconds for name, seconds in clock.seconds.items() if seconds}
    assert spent == {"student": 17, "teacher": 2, "logging": 8, "data": 32}
    clock.restart()
    assert clock.seconds == dict.fromkeys(PHASES, 0)


def test_the_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    """Work handed to a device costs no time until it is waited for."""
    wait, queue = fake_clock(monkeypatch), []

    def synchronize() -> None:
        while queue:
            wait(queue.pop())

    clock = PhaseClock(synchronize)
    queue.append(1)  # what was before belongs to no phase
    with clock.phase("student"):
        queue.append(2)
        with clock.phase("teacher"):
            queue.append(4)
        queue.append(8)
    assert clock.seconds["teacher"] == 4
    assert clock.seconds["student"] == 8 + 2


def test_time_goes_to_the_phase_that_took_it(workload, monkeypatch):
    subject = make_subject(workload)
    model, mapper = subject.model, semisup_timing.SemiMapper
    wait = fake_clock(monkeypatch)

    def slowly(seconds: float, function: Callable = lambda *args: None) -> Callable:
        def slow(*args):
            wait(seconds)
            return function(*args)

        return slow

    monkeypatch.setattr(mapper, "__call__", slowly(1, mapper.__call__))
    model.teacher.roi_heads.register_forward_pre_hook(slowly(4))
    model.student.proposal_generator.register_forward_pre_hook(slowly(8))
    model.student.backbone.bottom_up.res5.register_full_backward_hook(slowly(32))
    subject.step.optimizer.register_step_pre_hook(slowly(64))
    average = teacher_student.update_average
    monkeypatch.setattr(teacher_student, "update_average", slowly(128, average))
    model.monitor.read = slowly(256, model.monitor.read)
    subject.run(SEMISUP)
    assert subject.phases == [
        {
            "data": 2 * 1,  # a labelled and an unlabelled picture
            "teacher": 4,
            "student": 2 * 8,  # proposals for both groups, one backbone pass
            "backward": 32,
            "update": 64,
            "EMA": 128,
            "logging": 256,
        }
    ]


@pytest.mark.parametrize("opts", [(), SEPARATE])
def test_phases_add_up_to_the_step(workload, opts):
    subject = make_subject(workload, *opts)
    unaccounted = []
    for _ in range(4):
        total = subject.run(SEMISUP)
        parts = subject.phases[-1]
        assert tuple(parts) == PHASES
        assert min(parts.values()) > 0
        unaccounted.append(1 - sum(parts.values()) / total)
    assert min(unaccounted) >= 0
    assert min(unaccounted) < 0.03  # another process may interrupt any one of them


# ---- the work ----


def check_pseudo_boxes(subject: SemisupSubject, workload: Workload, classes: int) -> None:
    records, labels = subject.model.monitor.latest
    assert len(records) == subject.images
    for label in labels:
        order = label.gt_boxes.tensor[:, 0].argsort()
        expected = workload.truths[:, 0].argsort()
        assert len(label) == 20
        found = label.gt_boxes.tensor[order]
        assert torch.allclose(found, workload.truths[expected], atol=1e-3)
        assert torch.equal(label.gt_classes[order], expected % classes)
        assert label.scores.min() > 0.99


@pytest.mark.parametrize(
    "opts",
    [
        (),
        SEPARATE,
        ("MODEL.ROI_IOU_HEAD.TEST_THRESH", 0.9, "SEMISUP.PSEUDO.SCORE_THRESH", 0.9),
        ("MODEL.ROI_IOU_HEAD.ENABLED", False),
        ("SEMISUP.TEACHER_TRAIN_PROPOSALS", True),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_IOU_HEAD.ENABLED", False)
        + ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ],
)
def test_the_teacher_finds_the_objects(workload, opts):
    subject = make_subject(workload, *opts, images=2)
    subject.run(SEMISUP)
    check_pseudo_boxes(subject, workload, 80)
    assert subject.seen[SEMISUP]["pseudo boxes"] == [20, 20]
    assert subject.differs(SEMISUP) == []


@pytest.mark.parametrize("classes", [1, 4])
def test_the_teacher_finds_them_with_few_classes(workload, classes):
    subject = make_subject(workload, "MODEL.ROI_HEADS.NUM_CLASSES", classes)
    subject.run(SEMISUP)
    check_pseudo_boxes(subject, workload, classes)


def test_merged_and_separate_passes_lose_the_same(workload):
    losses = []
    for opts in ((), SEPARATE):
        subject = make_subject(workload, *opts)
        subject.run(SEMISUP)
        latest = subject.storage.latest()
        losses.append({name: value for name, (value, _) in latest.items() if "loss" in name})
    assert {"total_loss", "loss_cls", "loss_cls_pseudo", "loss_box_iou_pseudo"} <= set(losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        # 2 labelled pictures in 2 views, 2 unlabelled ones; 64 RoIs each, a quarter positive.
        ((), {"teacher box": [2000], "student box": [256, 128]}),
        (
            ("SEMISUP.TEACHER_TRAIN_PROPOSALS", True),
            {"teacher box": [4000], "student box": [256, 128]},
        ),
        (MASKS, {"teacher box": [2000], "student box": [256, 128], "student mask": [64]}),
        (
            (*MASKS, "SEMISUP.LOSS_WEIGHT.MASK", 1.0, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512),
            {
                **{"teacher box": [2000], "teacher mask": [40]},
                **{"student box": [2048, 1024], "student mask": [512, 256]},
            },
        ),
    ],
)
def test_every_branch_gets_what_is_promised(workload, opts, expected):
    subject = make_subject(workload, *opts, images=2)
    subject.run(SEMISUP)
    assert subject.seen[SEMISUP] == {**expected, "pseudo boxes": [20, 20]}
    assert subject.differs(SEMISUP) == []


def test_a_teacher_that_finds_less_is_told(workload):
    subject = make_subject(workload, "SEMISUP.PSEUDO.MAX_PER_IMAGE", 7)
    subject.run(SEMISUP)
    assert subject.differs(SEMISUP) == ["pseudo boxes [7] instead of 20"]


def test_the_step_is_whole_but_changes_nothing(workload):
    subject = make_subject(workload)
    model = subject.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = []
    model.update_teacher = lambda iteration, update=model.update_teacher: averaged.append(
        (iteration, update(iteration))
    )
    for _ in range(2):
        subject.run(SEMISUP)
    # 2000 steps of burn-in, of which the next is the copy.
    assert averaged == [(2001, None)] * 2
    assert model.burned_in
    for name, tensor in model.state_dict().items():
        # The average of equal weights; lerp rounds.
        assert torch.allclose(tensor, before[name], rtol=1e-6, atol=1e-9), name
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    trained = [p for p in model.student.parameters() if p.requires_grad]
    assert subject.parameters == sum(p.numel() for p in trained)
    state = subject.step.optimizer.state
    assert all(state[p]["momentum_buffer"] is not None for p in trained)  # SGD did its step


def test_reports_are_those_of_training(workload):
    subject = make_subject(workload)
    subject.run(SEMISUP)
    latest = {name: value for name, (value, _) in subject.storage.latest().items()}
    assert latest["pseudo/boxes_per_image"] == 20
    assert latest["pseudo/filtered_proposals"] == 0
    assert latest["pseudo/class_histogram/3"] == pytest.approx(1 / 20)
    assert math.isfinite(latest["total_loss"])


def test_every_step_sees_new_views_of_the_file(workload, monkeypatch):
    subject = make_subject(workload, images=2)
    made = []
    call = semisup_timing.SemiMapper.__call__

    def spy(self, record: dict, position: int) -> dict:
        mapped = call(self, record, position)
        made.append((self.group, position, mapped))
        return mapped

    monkeypatch.setattr(semisup_timing.SemiMapper, "__call__", spy)
    for _ in range(2):
        subject.run(SEMISUP)
    positions = [(group, position) for group, position, _ in made]
    first = [(group, n) for group in ("labeled", "unlabeled") for n in (0, 1)]
    assert positions == first + [(group, n + 2) for group, n in first]
    for group, _, mapped in made:
        assert mapped["image"].shape == (3, *SIZE)  # MIN_SIZE_TRAIN is its height
        assert not torch.equal(mapped["image"], mapped["strong_image"])
        assert ("instances" in mapped) == (group == "labeled")


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_the_file_has_the_objects(workload, tmp_path, masks):
    record = write_record(tmp_path, workload)
    assert cv2.imread(record["file_name"]).shape == (*SIZE, 3)
    cfg = make_cfg(*MASKS, "INPUT.MASK_FORMAT", masks, "INPUT.RANDOM_FLIP", "none")
    found = semisup_timing.SemiMapper(cfg, True, 0)(record, 0)["instances"]
    assert len(found) == 20
    assert torch.allclose(found.gt_boxes.tensor, workload.truths, atol=1e-3)
    # A regular polygon of 16 corners in an ellipse of half axes a, b: 8 sin(pi / 8) a b.
    area = 8 * math.sin(math.pi / 8) * found.gt_boxes.area() / 4
    own = torch.as_tensor(found.gt_masks.area() if masks == "polygon" else bitmap_areas(found))
    large = area > 400  # pixels are coarse for the others
    assert large.sum() > 3
    assert torch.allclose(own[large].float(), area[large], rtol=0.01 if masks == "polygon" else 0.1)


def bitmap_areas(found) -> torch.Tensor:
    return found.gt_masks.tensor.sum(dim=(1, 2))


def test_views_are_the_workloads_picture(workload):
    assert strong_view(make_cfg("INPUT.STRONG_AUG.ENABLED", False), workload) is workload.image
    strong = strong_view(make_cfg(), workload)
    assert strong.shape == workload.image.shape
    assert strong.dtype == torch.uint8
    assert not torch.equal(strong, workload.image)
