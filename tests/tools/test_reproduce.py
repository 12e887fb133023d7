"""tools/reproduce.py: its commands, without training; the rows themselves are in
tests/test_thesis_tables.py."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser

from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[2]
NAIVE = {"bbox": {"AP": 40.87, "AP50": 59.0}, "segm": {"AP": 37.24}}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/reproduce.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "tools")
        yield importlib.import_module("reproduce")


@pytest.fixture(scope="module")
def rows(tool):
    return tool.read_rows()


@pytest.fixture
def call(tool, monkeypatch, capsys, tmp_path):
    """Run the tool as if typed in an empty folder: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["reproduce.py", *map(str, arguments)])
        capsys.readouterr()
        code = tool.main()
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def launched(tool, monkeypatch):
    """Commands that `run` would have started."""
    commands = []

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return commands


def understood(command: list[str]):
    """What train_net.py makes of a command: its options and its configuration."""
    assert command[:2] == [sys.executable, str(REPO / "train_net.py")]
    args = default_argument_parser().parse_args(command[2:])
    return args, load_config(args.config_file, args.opts, add_sbr_cnn_config)


# ---- list, show ----


def test_list_has_the_figures(call):
    code, out = call("list", "--table", "2.15")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    (head,) = [line for line in lines if line[:1] == ["2.15/5"]]
    assert head[-4:] == ["41.8", "37.6", "38.6", "M"]
    assert sum(line[0].startswith("2.15/") for line in lines) == 12


def test_list_says_what_is_special(call):
    _, out = call("list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["2.20/2"].endswith("another project's model")
    assert lines["2.7/2"].endswith("weights of 2.7/4")
    assert lines["2.10/3"].endswith("one layer")
    assert not lines["2.7/4"].strip().endswith("2.7/4")


def test_show_is_yaml_with_the_notes_as_comments(call):
    _, out = call("show", "2.11/2")
    shown = yaml.safe_load(out)
    assert shown["SOLVER"]["MAX_ITER"] == 263_880  # 36 epochs
    assert shown["MODEL"]["RESNETS"]["NORM"] == "FrozenStatsBN"
    assert shown["OUTPUT_DIR"] == "output/thesis/2.11-2"
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert comments[0] == "# 2.11/2 Mask R-CNN (3x)"
    assert any("39.2" in line for line in comments)
    assert any("checkpoint's size in MB" in line for line in comments)


def test_show_tells_how_to_use_another_rows_weights(call):
    _, out = call("show", "2.7/3")
    assert "run 2.7/3 --eval-only MODEL.WEIGHTS output/thesis/2.7-4/model_final.pth" in out


def test_show_of_another_projects_model_has_no_configuration(call):
    _, out = call("show", "2.20/2")
    assert yaml.safe_load(out) is None
    assert "CondInst" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "2.15/50"), r"no row '2\.15/50'.*near: .*2\.15/5"),
        (("run", "2.15-5"), r"no row '2\.15-5'.*named as 2\.15/5.*near: .*2\.15/5"),
        (
            ("list", "--table", "2.26"),
            r"no table '2\.26'; there are 2\.1, .*2\.25, fig2\.16b, 2\.28",
        ),
        (("params", "--table", "2"), r"no table '2'"),
        (("run", "2.20/2"), r"2\.20/2, CondInst, is another project's model"),
        (("run", "2.10/1"), r"2\.10/1 is one layer, .*fc1; `params`"),
        (("run", "2.15/5", "SOLVER.MAX_ITERS", "9"), r"SOLVER\.MAX_ITERS.*SOLVER\.MAX_ITER"),
        (("report", "nowhere"), r"nowhere is no folder"),
        (("report", "."), r"holds no run of a row \(no thesis_row\.json\)"),
    ],
)
def test_mistakes_are_one_line(call, launched, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    assert str(error.value.code).startswith("error: ")
    assert "\n" not in error.value.code
    error.match(message)
    assert launched == []
    assert list(tmp_path.iterdir()) == []


# ---- params ----


@pytest.fixture
def change_row(tool, monkeypatch, tmp_path):
    """Let the tool read one row only, changed."""

    def change(row_id: str, **attributes) -> None:
        content = yaml.safe_load((REPO / "configs" / "thesis_tables.yaml").read_text())
        (row,) = content["rows"] = [row for row in content["rows"] if row["id"] == row_id]
        for key, value in attributes.items():
            row[key] = {**row[key], **value} if isinstance(value, dict) else value
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(content))
        changed = tool.read_rows(path)
        monkeypatch.setattr(tool, "read_rows", lambda: changed)

    return change


def test_params_of_a_table_that_agrees(call):
    code, out = call("params", "--table", "2.10")
    assert code == 0
    assert out.count("as printed") == 8
    assert out.splitlines()[-1] == "8 rows, 0 differ"


def test_params_says_what_it_cannot_compare(call):
    _, out = call("params", "--table", "2.20")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["2.20/2"].endswith("not part of this project")
    assert lines["2.20/4"].split()[2:] == ["61,800,708", "as", "computed"]  # methods 11


@pytest.mark.parametrize(
    ("row", "attributes", "verdict"),
    [
        ("2.10/2", {"thesis": {"params": "1,605,761"}}, "1,605,760 1,605,761 DIFFERS from 1,605"),
        ("2.19/2", {"exact_params": 51_162_401}, "51,162,400 DIFFERS from exact_params 51,162,401"),
        # Config 42.53 M, the reading's 43.24 M.
        ("2.16/4", {"thesis": {"params": "42.5 M"}}, "42,531,332 42.5 M DIFFERS from 42.5 M"),
        ("2.16/4", {"params_reading": {"exact_params": 43_247_941}}, "DIFFERS from 43.2 M, also"),
    ],
)
def test_params_fails_on_a_difference(call, change_row, row, attributes, verdict):
    change_row(row, **attributes)
    code, out = call("params")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith(f"{row} ")]
    assert verdict in " ".join(line.split())
    assert out.splitlines()[-1] == f"1 rows, 1 differ: {row}"


def test_params_shows_both_readings(call, change_row):
    change_row("2.16/4")
    code, out = call("params")
    (line,) = [line for line in out.splitlines() if line.startswith("2.16/4 ")]
    assert code == 0
    assert "42,531,332" in line
    assert line.endswith("as printed with MODEL.FCC.LAYERS square 43,247,940")


# ---- run ----


def test_run_trains_the_row(call, launched, rows, tmp_path):
    code, out = call("run", "2.14/8")
    assert code == 3  # train_net.py's own
    (command,) = launched
    args, cfg = understood(command)
    assert (args.num_gpus, args.eval_only) == (1, False)
    assert cfg == rows["2.14/8"].resolve(["OUTPUT_DIR", "output/thesis/2.14-8"])
    assert list(cfg.MODEL.ROI_LOOP_HEAD.IOUS) == [0.5, 0.6, 0.7, 0.75, 0.8]
    assert (cfg.MODEL.ROI_LOOP_HEAD.ORDER, cfg.SOLVER.IMS_PER_BATCH) == ("aabbb", 8)
    marker = tmp_path / "output" / "thesis" / "2.14-8" / "thesis_row.json"
    assert json.loads(marker.read_text()) == {"row": "2.14/8"}
    assert out == ""


def test_what_is_typed_wins(call, launched, tmp_path):
    typed = ("--num-gpus", "8", "--resume", "SOLVER.IMS_PER_BATCH", "8", "OUTPUT_DIR", "mine")
    call("run", "2.14/4", *typed)
    args, cfg = understood(launched[0])
    assert (args.num_gpus, args.resume) == (8, True)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.OUTPUT_DIR) == (8, "mine")
    assert cfg.MODEL.ROI_LOOP_HEAD.ORDER == "aab"  # the row's own
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_one_folder_is_one_rows(call, launched):
    call("run", "2.14/4", "OUTPUT_DIR", "mine")
    call("run", "2.14/4", "--resume", "OUTPUT_DIR", "mine")
    with pytest.raises(SystemExit, match="OUTPUT_DIR mine holds a run of row 2.14/4"):
        call("run", "2.14/5", "OUTPUT_DIR", "mine")
    assert len(launched) == 2


def test_run_hints_at_the_weights_of_another_row(call, launched):
    _, out = call("run", "2.13/2")
    assert "run 2.13/2 --eval-only MODEL.WEIGHTS output/thesis/2.13-4/model_final.pth" in out
    _, out = call("run", "2.13/2", "--eval-only", "MODEL.WEIGHTS", "w.pth")
    assert out == ""
    args, cfg = understood(launched[1])
    assert args.eval_only
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.ROI_LOOP_HEAD.TEST_LOOPS) == ("w.pth", 1)


def test_only_the_first_of_torchruns_processes_marks_the_folder(
    call, launched, monkeypatch, tmp_path
):
    monkeypatch.setenv("RANK", "1")
    call("run", "2.14/4")
    assert len(launched) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    call("run", "2.14/4")
    assert list(tmp_path.rglob("thesis_row.json"))


# ---- report ----


@pytest.fixture
def make_run(rows, tmp_path):
    """Write a finished run's folder as train_net.py would."""

    def make(
        name, row_id, *options, iterations=None, results=None, config=True, model=""
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "thesis_row.json").write_text(json.dumps({"row": row_id}))
        # What a run fills in by itself, and what is the user's own affair, is no difference.
        own = ["OUTPUT_DIR", name, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "SEED", "7"]
        if config:
            text = rows[row_id].resolve([*own, *map(str, options)]).dump()
            (folder / "config.yaml").write_text(text)
        if iterations:
            # The last line is the final evaluation's, at the iteration after the last.
            lines = [{"iteration": 19, "total_loss": 2.0}]
            lines.append({"iteration": iterations - 1, "total_loss": 1.0})
            lines.append({"iteration": iterations, "bbox/AP": 1.0})
            (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
        for dataset, result in (results or {}).items():
            path = folder / model / "inference" / dataset / "results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
        return folder

    return make


def read_markdown(text: str) -> dict[str, list[dict]]:
    """{row id: its lines as {column: text}} of all tables."""
    found: dict[str, list[dict]] = {}
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "row":
            head = cells
        elif line.startswith("| "):
            found.setdefault(cells[0], []).append(dict(zip(head, cells, strict=True)))
    return found


def test_a_whole_run_stands_beside_the_thesis(call, make_run):
    folder = make_run("r", "2.11/4", iterations=87_960, results={"coco_2017_val": NAIVE})
    code, out = call("report", "--table", "2.11", folder)
    assert code == 0
    assert out.startswith("### Table 2.11: R3-CNN, Mask R-CNN and HTC\n")
    lines = read_markdown(out)
    assert lines["2.11/4"] == [
        {
            "row": "2.11/4",
            "method": "R3-CNN (naive)",
            "box AP, thesis": "40.9",
            "box AP": "40.9",
            "mask AP, thesis": "37.2",
            "mask AP": "37.2",
            "parameters, thesis": "43,912 K",
            "parameters": "43,912,884",
            "tested on": "coco_2017_val",
            "iterations": "87,960 of 87,960",
            "remarks": "",
        }
    ]
    assert list(lines) == [f"2.11/{n}" for n in range(1, 6)]
    for row in ("2.11/1", "2.11/2", "2.11/3", "2.11/5"):
        assert lines[row][0]["box AP"] == lines[row][0]["mask AP"] == "not run"


def test_without_runs_everything_is_not_run(call):
    _, out = call("report")
    lines = read_markdown(out)
    # Table 2.10 has nothing to reproduce. Sections 2.1 to 2.3, 2.4, 2.5, 2.6, and 2.7.
    assert len(lines) == 137 - 8 + 26 + 6 + 7 + 13
    assert lines["2.20/2"][0]["box AP"] == "another project's model"
    others = [line[0]["box AP"] for row, line in lines.items() if row != "2.20/2"]
    assert set(others) == {"not run"}
    assert lines["2.1/1"][0]["mask AP"] == lines["2.1/1"][0]["mask AP, thesis"] == ""


def test_a_toy_run_is_marked(call, make_run):
    toy = ("SOLVER.MAX_ITER", 20, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", "('toy_val',)")
    deep = ("MODEL.RESNETS.DEPTH", 101, "INPUT.MIN_SIZE_TEST", 64, "SOLVER.BASE_LR", 0.001)
    make_run("runs/a", "2.11/4", *toy, iterations=20, results={"toy_val": NAIVE})
    make_run("runs/b", "2.11/4", *deep, iterations=87_960, results={"coco_2017_val": NAIVE})
    _, out = call("report", "--table", "2.11", "runs")
    first, second = read_markdown(out)["2.11/4"]
    assert first["iterations"] == "20 of 87,960"
    assert first["tested on"] == "toy_val"
    assert first["remarks"] == (
        "**not the row's settings**: SOLVER.MAX_ITER 20 (row: 87960), SOLVER.IMS_PER_BATCH 2 "
        "(row: 16), DATASETS.TEST ('toy_val',) (row: ('coco_2017_val',))"
    )
    assert second["remarks"] == (
        "**not the row's settings**: MODEL.RESNETS.DEPTH, SOLVER.BASE_LR, INPUT.MIN_SIZE_TEST"
    )
    assert second["parameters"] != "43,912,884"


def test_many_differences_are_counted(call, make_run):
    keys = ("MIN_SIZE_TEST", "MAX_SIZE_TEST", "MAX_SIZE_TRAIN")
    options = [text for key in keys for text in (f"INPUT.{key}", 64)]
    options += ["SOLVER.BASE_LR", 0.1, "SOLVER.MOMENTUM", 0.5, "SOLVER.GAMMA", 0.5]
    folder = make_run("r", "2.11/4", *options, iterations=87_960, results={"coco_2017_val": NAIVE})
    _, out = call("report", "--table", "2.11", folder)
    (line,) = read_markdown(out)["2.11/4"]
    assert line["remarks"].endswith(
        "SOLVER.BASE_LR, SOLVER.GAMMA, SOLVER.MOMENTUM, INPUT.MAX_SIZE_TEST, 2 more"
    )


def test_a_run_serves_all_rows_with_its_settings(call, make_run):
    make_run("r", "2.11/4", iterations=87_960, results={"coco_2017_val": NAIVE})
    _, out = call("report", ".")
    lines = read_markdown(out)
    served = [row for row, (line, *_) in lines.items() if line["box AP"] == "40.9"]
    assert served == ["2.11/4", "2.12/4", "2.13/4", "2.15/2"]
    assert lines["2.15/2"][0]["remarks"] == "run of 2.11/4"
    assert lines["2.15/2"][0]["parameters, thesis"] == "43.9 M"


def test_unfinished_and_unevaluated_runs_say_so(call, make_run):
    make_run("a", "2.11/4", iterations=500)
    make_run("b", "2.11/5", config=False)
    _, out = call("report", "--table", "2.11", ".")
    lines = read_markdown(out)
    (line,) = lines["2.11/4"]
    assert (line["box AP"], line["iterations"]) == ("", "500 of 87,960")
    assert line["remarks"] == "not evaluated; unfinished"
    assert lines["2.11/5"][0]["box AP"] == "not run"  # only marked, it never began


def test_an_evaluation_with_another_rows_weights(call, make_run):
    results = {"coco_2017_val": {"bbox": {"AP": 37.7}, "segm": {"AP": None}}}
    make_run("r", "2.13/2", "MODEL.WEIGHTS", "w.pth", results=results)
    _, out = call("report", "--table", "2.13", ".")
    (line,) = read_markdown(out)["2.13/2"]
    assert (line["box AP"], line["mask AP"]) == ("37.7", "none")
    assert line["iterations"] == "none here"
    assert line["remarks"] == "weights of 2.13/4"


def test_every_test_set_has_its_line(call, make_run):
    results = {"coco_2017_val": NAIVE, "other_val": {"bbox": {"AP": 1.25}}}
    tests = "('coco_2017_val', 'other_val')"
    make_run("r", "2.19/1", "DATASETS.TEST", tests, iterations=87_960, results=results)
    _, out = call("report", "--table", "2.19", "r")
    first, second = read_markdown(out)["2.19/1"]
    assert (first["tested on"], second["tested on"]) == ("coco_2017_val", "other_val")
    assert (first["box AP"], second["box AP"]) == ("40.9", "1.2")
    assert "DATASETS.TEST" in first["remarks"]


# ---- single classes ----


def read_class_lines(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(row, class): (thesis, here, tested on)} of the report's tables by class."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and "/" in cells[0]:
            row, _, _, name, *figures = cells
            found[row, name] = tuple(figures)
    return found


def test_classes_stand_beside_the_thesis(call, make_run):
    box = {"AP": 20.04, "AP-black_rot_foglia": 44.0, "AP-botrite_foglia": None}
    results = {"ldd_val": {"bbox": box, "segm": {"AP": 19.0, "AP-black_rot_foglia": 1.0}}}
    # Trained as a row of Table 2.28, with LDD's ten classes.
    make_run("r", "2.28/1", iterations=10_572, results=results)
    code, out = call("report", "--table", "2.29", "r")
    assert code == 0
    lines = read_class_lines(out)
    assert len(lines) == 2 * 10
    assert lines["2.29/1", "black_rot_foglia"] == ("45.8", "44.0", "ldd_val")
    assert lines["2.29/1", "botrite_foglia"] == ("41.7", "none", "ldd_val")  # no truth there
    assert lines["2.29/1", "foglia_vite"] == ("51.3", "", "ldd_val")
    assert lines["2.29/2", "peronospora_grappolo"] == ("1.4", "not tested", "")
    _, out = call("report", "--table", "2.30", "r")
    assert read_class_lines(out)["2.30/1", "black_rot_foglia"] == ("48.6", "1.0", "ldd_val")


def test_tables_without_classes_have_no_such_lines(call):
    for table in ("2.28", "2.20", "fig2.32a"):
        _, out = call("report", "--table", table)
        assert read_class_lines(out) == {}
        assert out.count("| row ") == 1


def test_run_of_a_row_on_ldd(call, launched):
    call("run", "2.30/2")
    _, cfg = understood(launched[0])
    assert cfg.DATASETS.TRAIN == ("ldd_train",)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SOLVER.MAX_ITER) == (10, 12 * 881)
    assert cfg.OUTPUT_DIR == "output/thesis/2.30-2"


def test_run_of_a_percentage_of_asnd(call, launched):
    call("run", "fig2.32a/4")
    _, cfg = understood(launched[0])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.SPLIT.PERCENT) == (("asnd_train",), 20.0)
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudentRCNN"


# ---- semi-supervised rows ----


def test_list_and_show_of_a_figure(call):
    _, out = call("list", "--table", "fig2.16b")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["fig2.16b/1", "fig2.16b/2"]
    _, out = call("show", "fig2.16b/2")
    assert "# Fig. 2.16b: IoU branch" in out
    assert yaml.safe_load(out)["MODEL"]["ROI_IOU_HEAD"]["LOSS"] == "smooth_l1"


def test_notes_of_a_semi_supervised_row(call):
    """Split, noise, and where the published code differs from the text."""
    _, out = call("show", "2.22/2")
    for word in ("COCO_supervision.txt", "seed 1", "noise", "ELU", "gamma", "teacher"):
        assert word in out.split("CUDNN_BENCHMARK")[0], word


def test_params_of_semi_supervised_rows_count_the_student_alone(call):
    code, out = call("params", "--table", "2.25")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert code == 0
    # Faster R-CNN with FrozenBN and the branch of 1024 + 81 inputs (methods-il-net 3.1).
    assert lines["2.25/4"][-3:] == [f"{41_527_712 - 50_176 + 1_215_569:,}", "as", "computed"]


def test_run_of_a_semi_supervised_row(call, launched):
    call("run", "2.25/4", "DATASETS.SPLIT.FILE", "COCO_supervision.txt")
    _, cfg = understood(launched[0])
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudentRCNN"
    assert cfg.DATASETS.SPLIT.FILE == "COCO_supervision.txt"
    assert tuple(cfg.MODEL.ROI_IOU_HEAD.INPUTS) == ("feature", "logits")
    assert cfg.SEMISUP.LOSS_WEIGHT.BOX_REG == 1.0


def test_the_teacher_stands_beside_the_thesis(call, make_run):
    """Also where the student was tested last, or somebody put results into the run's own folder."""
    box = {"bbox": {"AP": 32.1664}}
    options = ("DATASETS.SPLIT.FILE", "lists/COCO_supervision.txt", "SEMISUP.EVAL", "('teacher',)")
    folder = make_run(
        "r",
        "2.25/4",
        *options,
        iterations=180_000,
        results={"coco_2017_val": box},
        model="teacher",
    )
    for other in ("", "student"):
        path = folder / other / "inference" / "coco_2017_val" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"bbox": {"AP": 11.0}}))
    _, out = call("report", "--table", "2.25", "r")
    (line,) = read_markdown(out)["2.25/4"]
    assert (line["box AP, thesis"], line["box AP"]) == ("32.166", "32.166")
    assert line["mask AP"] == line["mask AP, thesis"] == line["parameters, thesis"] == ""
    assert line["parameters"] == f"{41_527_712 - 50_176 + 1_215_569:,}"
    assert line["iterations"] == "180,000 of 180,000"
    assert line["remarks"] == "labelled images of lists/COCO_supervision.txt"


def test_a_run_on_labels_of_its_own_says_so(call, make_run):
    results = {"coco_2017_val": {"bbox": {"AP": 31.0}}}
    other = ("SEMISUP.LOSS_WEIGHT.BOX_REG", "2.0", "DATASETS.SPLIT.PERCENT", "5.0")
    make_run("a", "2.22/1", iterations=180_000, results=results, model="teacher")
    make_run("b", "2.22/1", *other, iterations=180_000, results=results, model="student")
    _, out = call("report", ".")
    lines = read_markdown(out)
    first, second = lines["2.22/1"]
    assert (first["box AP"], first["remarks"]) == ("31.000", "labelled images drawn")
    assert second["box AP"] == ""
    assert second["remarks"] == (
        "not evaluated; labelled images drawn; **not the row's settings**: "
        "DATASETS.SPLIT.PERCENT 5.0 (row: 10.0), SEMISUP.LOSS_WEIGHT.BOX_REG"
    )
    assert lines["2.25/1"][0]["remarks"] == "run of 2.22/1; labelled images drawn"
    assert "### Fig. 2.16b: IoU branch" in out


def test_a_row_takes_no_other_configuration(call, launched):
    with pytest.raises(SystemExit, match="--config-file other.yaml: a row has its own"):
        call("run", "2.20/4", "--config-file", "other.yaml")
    assert launched == []


def test_a_folder_with_another_run_is_refused(call, launched, tmp_path):
    (tmp_path / "config.yaml").write_text("VERSION: 2")
    with pytest.raises(SystemExit, match="holds a run that is no row's"):
        call("run", "2.20/4", "OUTPUT_DIR", str(tmp_path))
    assert launched == [] and not (tmp_path / "thesis_row.json").exists()
