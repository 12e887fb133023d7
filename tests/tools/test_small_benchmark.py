"""The small benchmark: what it runs and in which order, what it does not repeat, its arithmetic."""

import importlib
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytest.importorskip("detectron2")
pytest.importorskip("timm")

from il_net.benchmark import small_table as tables
from il_net.benchmark.small_protocol import (
    CELLS,
    CHOICES,
    IL_NET,
    LEAVES,
    LEAVES_10,
    SBR_STUDENT,
    SUPERVISED,
    TABLES,
    Choice,
    Method,
    Run,
    Table,
    final_run,
    needed_choices,
    planned,
    run_folder,
    select_tables,
    tuning_run,
    write_tuning_part,
)
from il_net.benchmark.small_report import write_report
from il_net.benchmark.small_runs import (
    CHOSEN,
    RESULT,
    SmallBenchmark,
    Stopped,
    Trainings,
    all_classes,
    chosen_settings,
    counted_classes,
)
from il_net.config import load_config
from il_net.data.synthetic import generate
from il_net.engine.preemption import PREEMPTED
from sbr_cnn import add_sbr_cnn_config
from tests.e2e.runner import Runner
from tests.test_configs import leaves

REPO = Path(__file__).parents[2]
CONFIGS = REPO / "configs" / "benchmark"
CHOSEN_ALL = {choice.name: ("SOLVER.BASE_LR", "0.5") for choice in CHOICES}


def options(settings: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(settings[::2], settings[1::2], strict=True))


def load(method: Method):
    return load_config(str(CONFIGS / f"{method.config}.yaml"), [], add_sbr_cnn_config)


# ---- what is compared, and how evenly ----


def test_every_method_with_one_seed_comes_before_the_next_seed():
    runs = list(planned(TABLES, [3, 1]))
    once = [(table, method) for table in TABLES for method in table.methods]
    assert [(t, m) for t, m, _ in runs] == once * 2
    assert [seed for _, _, seed in runs] == [3] * len(once) + [1] * len(once)
    folders = {run_folder(*planned_run) for planned_run in runs}
    assert len(folders) == 2 * len(once) == 2 * (6 + 2 + 3 * 3)


def test_a_seed_is_the_same_split_and_order_for_all_methods_of_a_table():
    for table in TABLES:
        found = [options(final_run(table, m, 7, CHOSEN_ALL).settings) for m in table.methods]
        seeds = {(o["SEED"], o["DATASETS.SPLIT.SEED"]) for o in found}
        percents = {float(o["DATASETS.SPLIT.PERCENT"]) for o in found}
        assert seeds == {("7", "7")}
        assert percents == {table.percent}
    assert [CELLS[p].percent for p in (5, 10, 20)] == [5, 10, 20]


# What may differ from the first of them: what makes the methods, the rate, where the run goes.
HEADS = ("MODEL.ROI_", "MODEL.GROIE", "MODEL.FCC", "MODEL.MASK_IOU_HEAD", "MODEL.C2SSL")
OWN = ("SOLVER.BASE_LR", "OUTPUT_DIR")
UNLABELED = ("SEMISUP.", "SOLVER.IMS_PER_BATCH_UNLABELED", "MODEL.ROI_IOU_HEAD")


@pytest.mark.parametrize(
    ("table", "allowed"),
    [(LEAVES, HEADS), (LEAVES_10, HEADS), (CELLS[10], UNLABELED)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_configurations_of_a_table_differ_in_the_method_alone(table, allowed):
    first = dict(leaves(load(table.methods[0])))
    for method in table.methods[1:]:
        other = dict(leaves(load(method)))
        changed = {key for key in first if first[key] != other[key]}
        assert {k for k in changed if not k.startswith((*allowed, *OWN))} == set(), method.name
        assert load(method).MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 64


def test_semi_supervised_methods_share_what_the_pseudo_labels_are_made_with():
    for table in (LEAVES_10, CELLS[10]):
        methods = [m for m in table.methods if m is not SUPERVISED]
        first = dict(leaves(load(methods[0]).SEMISUP))
        for method in methods[1:]:
            other = dict(leaves(load(method).SEMISUP))
            changed = {key for key in first if first[key] != other[key]}
            # Unbiased Teacher has no box losses on unlabelled pictures.
            assert changed <= {"LOSS_WEIGHT.BOX_REG", "LOSS_WEIGHT.RPN_LOC"}, method.name
    for choice in CHOICES:
        keys = [list(options(settings)) for settings in choice.candidates.values()]
        assert all(k == keys[0] for k in keys), choice.name


@pytest.mark.parametrize("method", {m.config: m for t in TABLES for m in t.methods}.values())
def test_schedules_have_four_evaluations_and_a_burn_in_of_at_most_half(method):
    cfg = load(method)
    assert cfg.TEST.EVAL_PERIOD * 4 == cfg.SOLVER.MAX_ITER
    if cfg.MODEL.META_ARCHITECTURE == "TeacherStudentRCNN":
        burn_in, steps = cfg.SEMISUP.BURN_IN_ITERS, cfg.SOLVER.MAX_ITER
        assert burn_in == steps if method is SUPERVISED else 0 < burn_in <= steps / 2


def test_rates_are_compared_over_half_of_the_steps():
    for choice in CHOICES:
        for judge in choice.judges:
            steps, tuned = load(judge).SOLVER.MAX_ITER, options(choice.settings)
            half = {"SOLVER.MAX_ITER": str(steps // 2)}
            assert tuned == (half if choice.name.startswith("rate_") else {}), choice.name


def test_choices_come_in_an_order_in_which_they_can_be_made():
    assert [c.name for c in needed_choices([IL_NET])] == ["rate_bccd", "pseudo_bccd"]
    # Its pseudo labels' settings are judged with the other student as well, whose rate is needed.
    names = [c.name for c in needed_choices([SBR_STUDENT])]
    assert names == ["rate_mask_rcnn", "rate_sbr_cnn", "pseudo_coffee_leaf"]
    done = set()
    for choice in needed_choices(m for table in TABLES for m in table.methods):
        for judge in choice.judges:
            earlier = judge.choices[: judge.choices.index(choice.name)]
            assert done >= set(earlier)
        done.add(choice.name)
    assert len(done) == len(CHOICES)


def test_tables_are_selected_by_name_and_method():
    assert [t.name for t in select_tables(["bccd_5", "bccd_10"], [])] == ["bccd_10", "bccd_5"]
    (table,) = select_tables([], ["htc"])
    assert (table.name, [m.name for m in table.methods]) == ("coffee_leaf", ["htc"])
    with pytest.raises(ValueError, match=r"--tables leaves: .*'bccd_10'.*'coffee_leaf'"):
        select_tables(["leaves"], [])
    with pytest.raises(ValueError, match=r"--only htc: .*'il_net', 'supervised'"):
        select_tables(["bccd_10"], ["htc"])


# ---- the tuning part ----


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A root with the data set "tiny": 20 training and 3 val images, one "rare" object in val."""
    root = tmp_path / "root"
    for part, ids in (("train", range(20)), ("val", range(100, 103))):
        objects = [(i, 1) for i in ids] + [(i, 2) for i in list(ids)[::5]]
        data = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in ids],
            "annotations": [
                {"id": n, "image_id": i, "category_id": c, "bbox": [1, 1, 4, 4], "area": 16}
                | {"iscrowd": 0, "segmentation": []}
                for n, (i, c) in enumerate(objects, 1)
            ],
            "categories": [{"id": 1, "name": "leaf"}, {"id": 2, "name": "rare"}],
        }
        path = root / "tiny" / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root


def image_ids(path: Path) -> set[int]:
    return {image["id"] for image in json.loads(path.read_text())["images"]}


def test_the_tuning_part_is_a_fifth_of_train_and_not_val(root, tmp_path):
    part = write_tuning_part("tiny", tmp_path / "tuning")
    kept, held_out = image_ids(part / "train.json"), image_ids(part / "val.json")
    assert (len(kept), len(held_out)) == (16, 4)
    assert not kept & held_out
    assert kept | held_out == set(range(20))
    assert not held_out & image_ids(root / "tiny/annotations/instances_val.json")
    # Four rare objects in 20 images: in proportion, one is held out.
    assert all_classes(part / "val.json") == {"leaf": 4, "rare": 1}
    before = (part / "val.json").read_bytes()
    write_tuning_part("tiny", tmp_path / "again")
    assert (tmp_path / "again" / "tiny" / "val.json").read_bytes() == before


def test_a_class_with_one_object_does_not_count(root):
    val = root / "tiny" / "annotations" / "instances_val.json"
    assert all_classes(val) == {"leaf": 3, "rare": 1}
    assert counted_classes(val) == {"leaf": 3}


def test_candidates_are_trained_and_scored_on_the_tuning_part_alone(tmp_path):
    choice = CHOICES[-2]
    assert (choice.name, choice.judges[1]) == ("pseudo_bccd", IL_NET)
    label = next(iter(choice.candidates))
    chosen = {"rate_bccd": ("SOLVER.BASE_LR", "0.123")}
    found = options(tuning_run(choice, IL_NET, label, chosen, tmp_path).settings)
    assert found["DATASETS.TRAIN"] == "tuning_train"
    assert found["DATASETS.TEST"] == "tuning_val"
    files = [d["json"] for d in yaml.safe_load(found["DATASETS.REGISTER"])]
    assert files == [str(tmp_path / "train.json"), str(tmp_path / "val.json")]
    assert found["SOLVER.BASE_LR"] == "0.123"
    for key, value in options(choice.candidates[label]).items():
        assert found[key] == value


# ---- running ----


A = Method("a", "A", "config_a", ("rate",))
B = Method("b", "B", "config_b", ("rate",))
TINY = Table("tiny_table", "Tiny", "tiny", (A, B))
RATES = {"low": "1", "high": "2", "wild": "9"}
RATE = Choice("rate", TINY, (A,), {name: ("SOLVER.BASE_LR", r) for name, r in RATES.items()})


class FakeTraining:
    """Leaves what train_net.py would: AP is ten times the learning rate, and 9 diverges."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.stop_at: str | None = None

    def __call__(self, run: Run, settings: tuple[str, ...], folder: Path) -> int:
        if run.folder == self.stop_at:
            raise Stopped
        self.runs.append(run.folder)
        rate = float(options(tuple(settings))["SOLVER.BASE_LR"])
        if rate == 9:
            return 1
        seed = int(options(tuple(settings))["SEED"])
        (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 8}\n")
        (folder / "model_0000003.pth").touch()
        (folder / "model_final.pth").touch()
        lines = [{"iteration": 3, "time": 2.0}]
        for done, gain in ((4, 0), (8, 5)):
            ap = 10 * rate + gain + seed + (run.config == "config_b")
            lines.append({"iteration": done - 1, "bbox/AP": 1.0, "bbox/AP-leaf": ap})
            lines[-1] |= {"bbox/AP50": 2.0, "bbox/AP50-leaf": ap, "bbox/AP-rare": 0.0}
        (folder / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return 0


@pytest.fixture
def training(monkeypatch) -> FakeTraining:
    monkeypatch.setattr("il_net.benchmark.small_protocol.CHOICES", (RATE,))
    return FakeTraining()


def benchmark(folder: Path, training: FakeTraining, *extra: str) -> SmallBenchmark:
    return SmallBenchmark(folder, training, lambda config, settings: 1234, extra)


TUNING = [f"tuning/rate/a-{label}" for label in ("low", "high", "wild")]
FINAL = [f"tiny_table/{name}/seed{seed}" for seed in (1, 2) for name in ("a", "b")]


def test_runs_come_once_and_with_the_best_candidate(root, tmp_path, training):
    folder, finished = tmp_path / "out", []
    ran = benchmark(folder, training)
    ran.run([TINY], [1, 2], lambda: finished.append(len(training.runs)))
    assert training.runs == TUNING + FINAL
    assert finished == [4, 5, 6, 7]
    # 25 + 1 for the rate of 2; the diverged one is none.
    assert chosen_settings(folder) == {"rate": ("SOLVER.BASE_LR", "2")}
    kept = json.loads((folder / CHOSEN).read_text())["rate"]
    assert kept["scores"]["high"] == {"a": 26.0}
    assert ran.failed == ["tuning/rate/a-wild"]
    for name in FINAL:
        settings = json.loads((folder / name / "settings.json").read_text())["settings"]
        assert options(tuple(settings))["SOLVER.BASE_LR"] == "2"
        assert [p.name for p in (folder / name).glob("*.pth")] == ["model_final.pth"]
    again = FakeTraining()
    benchmark(folder, again).run([TINY], [1, 2], lambda: None)
    assert again.runs == []
    more = FakeTraining()
    benchmark(folder, more).run([TINY], [1, 2, 3], lambda: None)
    assert more.runs == ["tiny_table/a/seed3", "tiny_table/b/seed3"]


@pytest.mark.parametrize("place", [TUNING[1], FINAL[2]])
def test_a_stopped_benchmark_goes_on_where_it_was(root, tmp_path, training, place):
    training.stop_at = place
    with pytest.raises(Stopped):
        benchmark(tmp_path / "out", training).run([TINY], [1, 2], lambda: None)
    order = TUNING + FINAL
    assert training.runs == order[: order.index(place)]
    rest = FakeTraining()
    benchmark(tmp_path / "out", rest).run([TINY], [1, 2], lambda: None)
    # A candidate that failed is tried again as long as nothing is chosen.
    assert rest.runs == order[order.index(place) :]


def test_a_folder_begun_with_other_settings_is_refused(root, tmp_path, training):
    training.stop_at = FINAL[1]
    with pytest.raises(Stopped):
        benchmark(tmp_path / "out", training).run([TINY], [1], lambda: None)
    training.stop_at = None
    with pytest.raises(ValueError, match=r"--output: .*out was begun with other settings"):
        benchmark(tmp_path / "out", training, "SOLVER.MAX_ITER", "5").run([TINY], [1], lambda: None)
    # A run of another protocol.
    folder = tmp_path / "out" / FINAL[0]
    (folder / RESULT).unlink()
    (folder / "settings.json").write_text('{"config": "other", "settings": []}')
    with pytest.raises(ValueError, match=r"--output: .*seed1 was begun with other settings"):
        benchmark(tmp_path / "out", training).run([TINY], [1], lambda: None)


def test_without_any_candidate_nothing_is_trained(root, tmp_path, training, monkeypatch):
    wild = Choice("rate", TINY, (A,), {"wild": ("SOLVER.BASE_LR", "9")})
    monkeypatch.setattr("il_net.benchmark.small_protocol.CHOICES", (wild,))
    with pytest.raises(ValueError, match=r"rate: none of \['wild'\] has a result"):
        benchmark(tmp_path / "out", training).run([TINY], [1], lambda: None)
    assert training.runs == [TUNING[2]]


def test_the_report_has_means_spreads_and_paired_differences(root, tmp_path, training):
    folder = tmp_path / "out"
    benchmark(folder, training).run([TINY], [1, 2], lambda: None)
    text = write_report(folder, [TINY], [1, 2, 3], 1).read_text()
    # A: 26 and 27, B one more each; the spread of 26 and 27 is 1 / sqrt(2).
    assert "| A | 2 | 1,234 | 2.00 | 26.5 ± 0.7 | 26.5 ± 0.7 |" in text
    assert "| B | 2 | 1,234 | 2.00 | 27.5 ± 0.7 | 27.5 ± 0.7 |" in text
    assert "Differences to A, seed by seed" in text
    assert "| B | 2 | +1.0 ± 0.0 | +1.0 ± 0.0 |" in text
    # As COCO counts, with the class that has one object.
    assert "Over all classes, rare included" in text
    assert "| A | 2 | 1.0 ± 0.0 | 2.0 ± 0.0 |" in text
    assert "|  | leaf (3) | rare (1) |" in text
    assert "- rate: **high** (low: a 16.0; high: a 26.0; wild: a nan)" in text
    assert (folder / "tiny_table.png").stat().st_size > 1000
    unfinished = Table("other", "Other", "tiny", (A, B))
    assert "## Other\n\nNot run." in write_report(folder, [unfinished], [1], 1).read_text()


# ---- processes ----


SCRIPT = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
def stop(number, frame):
    (folder / "stopped").write_text(str(number))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
(folder / "argv").write_text(" ".join(sys.argv[1:]))
print("started", flush=True)
code = int(sys.argv[-3])
time.sleep(60 if code < 0 else 0)
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Start a training that ends with a code, or with -1 sleeps until a signal comes."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    folder = tmp_path / "run"
    folder.mkdir()

    def start(code: int, hours: float = math.inf) -> int:
        trainings = Trainings(tmp_path / "fake.py", tmp_path, threads=1, hours=hours)
        with trainings:
            return trainings(Run("run", "name", ()), ["KEY", str(code)], folder)

    return start


def test_a_training_is_a_process_that_can_go_on(start, tmp_path):
    assert start(0) == 0
    typed = (tmp_path / "run" / "argv").read_text()
    config = tmp_path / "name.yaml"
    expected = f"--config-file {config} --resume-or-start KEY 0 OUTPUT_DIR {tmp_path / 'run'}"
    assert typed == expected
    assert start(3) == 3
    assert (tmp_path / "run" / "output.txt").read_text() == "started\nstarted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_training_and_stop_the_benchmark(start, tmp_path, number):
    before = signal.getsignal(number)

    def send() -> None:
        while not (tmp_path / "run" / "argv").is_file():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(Stopped):
        start(-1)
    assert (tmp_path / "run" / "stopped").read_text() == str(int(number))
    assert signal.getsignal(number) is before


def test_a_training_stops_at_the_deadline_and_none_starts_after_it(start, tmp_path):
    with pytest.raises(Stopped):
        start(-1, hours=1.5 / 3600)
    assert (tmp_path / "run" / "stopped").read_text() == str(int(signal.SIGTERM))
    (tmp_path / "run" / "argv").unlink()
    with pytest.raises(Stopped):
        start(0, hours=0)
    assert not (tmp_path / "run" / "argv").exists()


def test_a_training_that_was_preempted_is_not_a_failure(start):
    with pytest.raises(Stopped):
        start(PREEMPTED)


# ---- arithmetic ----


def test_mean_and_spread_by_hand():
    # Mean 4, squares of differences 4 + 0 + 4, divided by n - 1 = 2: variance 4.
    assert tables.mean_and_spread([2.0, 4.0, 6.0]) == (4.0, 2.0)
    mean, spread = tables.mean_and_spread([5.0])
    assert mean == 5.0
    assert math.isnan(spread)


def test_paired_differences_are_of_the_seeds_that_both_have():
    first = {1: {"AP": 10.0}, 2: {"AP": 20.0}, 3: {"AP": 0.0}}
    row = {2: {"AP": 21.0}, 1: {"AP": 12.0}, 4: {"AP": 99.0}}
    assert tables.paired_differences(row, first, "AP") == [2.0, 1.0]
    # Means over all seeds would say 44 - 10 = 34.
    rows = {
        name: {s: {"bbox/AP": m["AP"], "bbox/AP50": 1.0} for s, m in by_seed.items()}
        for name, by_seed in (("first", first), ("row", row), ("none", {}))
    }
    lines = tables.difference_table(rows)
    assert lines[2:] == [
        "| row | 2 | +1.5 ± 0.7 | +0.0 ± 0.0 |",
        "| none | not run |  |  |",
    ]


def test_boxes_alone_and_masks_are_told_apart():
    both = {"bbox/AP": 1.0, "bbox/AP50": 2.0, "segm/AP": 3.0, "segm/AP50": 4.0}
    lines = tables.value_table({"x": {1: both}, "y": {}}, {"x": (5000, 0.25)})
    assert lines[0] == (
        "|  | seeds | parameters | s/step | box AP | box AP50 | mask AP | mask AP50 |"
    )
    assert lines[2:] == [
        "| x | 1 | 5,000 | 0.25 | 1.0 | 2.0 | 3.0 | 4.0 |",
        "| y | not run |  |  |  |  |  |  |",
    ]


def test_class_means_leave_the_uncounted_class_out():
    metrics = {"bbox/AP": 50.0, "bbox/AP-a": 10.0, "bbox/AP-b": 40.0, "bbox/AP-rare": 100.0}
    metrics |= {"bbox/AP50-a": 30.0, "bbox/AP50-b": 50.0}
    assert tables.counted_metrics(metrics, ["a", "b"]) == {"bbox/AP": 25.0, "bbox/AP50": 40.0}
    assert math.isnan(tables.class_mean(metrics, "bbox", "AP", ["a", "missing"]))


def test_metrics_of_a_resumed_run_are_those_written_last(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [
        {"iteration": 19, "time": 1.0, "student/bbox/AP": 1.0, "lr": 0.1},
        {"iteration": 39, "time": 9.0},
        {"iteration": 39, "time": 3.0, "student/bbox/AP": 2.0, "teacher/bbox/AP": 3.0},
        {"iteration": 40, "student/bbox/AP": 4.0, "teacher/bbox/AP-leaf": 5.0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 41, "ti')
    found = tables.read_metrics(path, 40)
    assert found["student"] == {20: {"bbox/AP": 1.0}, 40: {"bbox/AP": 4.0}}
    assert found["teacher"] == {40: {"bbox/AP": 3.0, "bbox/AP-leaf": 5.0}}
    # The second line was written anew: 1 s and 3 s.
    assert tables.seconds_per_step(path) == 2.0
    with pytest.raises(ValueError, match="no evaluation after step 60"):
        tables.read_metrics(path, 60)


# ---- the command line ----


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "tools")
        yield importlib.import_module("small_benchmark")


def test_list_starts_nothing_and_tells_what_is_finished(tool, tmp_path, capsys):
    done = tmp_path / "out" / "bccd_10" / "il_net" / "seed2" / RESULT
    done.parent.mkdir(parents=True)
    done.touch()
    arguments = ["--output", str(tmp_path / "out"), "--tables", "bccd_10", "--only", "il_net"]
    assert tool.main([*arguments, "--seeds", "2,1", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["rate_bccd", "pseudo_bccd"]
    assert lines[0].endswith("by supervised: not chosen yet")
    names = [f"bccd_10/il_net/seed{s}" for s in (2, 1)]
    finished = {names[0]: "finished"}
    assert lines[2:] == [f"train  {name}: {finished.get(name, 'to do')}" for name in names]
    assert not (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize("typed", [["--seeds", "1,1"], ["--seeds", "x"], ["--max-hours", "-1"]])
def test_wrong_numbers_are_refused(tool, tmp_path, typed, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--output", str(tmp_path), *typed])
    assert f"argument {typed[0]}" in capsys.readouterr().err


def test_missing_data_are_named_before_anything_starts(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"data set bccd: there is no file .*instances_train"):
        tool.main(["--output", str(tmp_path / "out"), "--tables", "bccd_10"])
    assert not (tmp_path / "out").exists()


TWO_STEPS = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1", "SOLVER.IMS_PER_BATCH", "2"),
    *("TEST.EVAL_PERIOD", "1", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64"),
]


@pytest.mark.slow
def test_two_steps_then_nothing_more(tool, tmp_path, monkeypatch, capsys):
    images = tmp_path / "root" / "coffee_leaf" / "images"
    for part, number in (("train", 4), ("val", 2)):
        made = generate(images, num_images=number, image_size=(64, 64), name=part)
        data = json.loads(made.json.read_text())
        for image in data["images"]:
            image["file_name"] = f"{part}/{image['file_name']}"
        target = images.parent / "annotations" / f"instances_{part}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(data))
    out = tmp_path / "out"
    out.mkdir()
    chosen = {"label": "x", "settings": ["SOLVER.BASE_LR", "0.001"], "scores": {}}
    (out / CHOSEN).write_text(json.dumps({"rate_mask_rcnn": chosen}))
    arguments = ["--output", str(out), "--only", "mask_rcnn", "--seeds", "4", *TWO_STEPS]
    runner = Runner(tmp_path, tmp_path / "root", tmp_path)
    first = runner.alone(sys.executable, REPO / "tools" / "small_benchmark.py", *arguments)
    assert first.code == 0, first.output
    assert first.last_line == str(out / "report.md")
    folder = out / "coffee_leaf" / "mask_rcnn" / "seed4"
    result = json.loads((folder / RESULT).read_text())
    assert result["steps"] == 2
    assert list(result["curves"][""]) == ["1", "2"]
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    assert (cfg["SEED"], cfg["SOLVER"]["BASE_LR"]) == (4, 0.001)
    assert "| Mask R-CNN | 1 |" in (out / "report.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    assert tool.main(arguments) == 0
    assert capsys.readouterr().out == f"{out / 'report.md'}\n"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert "A trial with SOLVER.MAX_ITER 2" in (out / "report.md").read_text()
    # What a trial has left is never taken for a result.
    with pytest.raises(SystemExit, match="was begun with other settings"):
        tool.main(arguments[: -len(TWO_STEPS)])
