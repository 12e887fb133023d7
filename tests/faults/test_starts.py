"""Starts that fail, or begin anew: what an earlier run has left stays, and stays apart."""

from tests.e2e.test_command_line import read_metrics


def test_a_failed_start_leaves_a_finished_run_alone(run, config, tmp_path, injected):
    injected(2)
    command = ("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path)
    short = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    assert run(*command, *short).code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".yaml", ".pth")}
    assert {"config.yaml", "model_final.pth"} <= before.keys()
    for mistake in (("MODEL.WEIGHTS", "gone.pth"), ("SOLVER.IMS_PER_BATCH", 0)):
        result = run(*command, *short, *mistake)
        assert result.code == 1 and "Traceback" not in result.output
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    # A start that succeeds replaces it.
    assert run(*command, *short, "SOLVER.BASE_LR", 0.007).code == 0
    assert "BASE_LR: 0.007" in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "config_new.yaml").exists()
    # And what was there is beside it, where no --resume looks.
    earlier = {p.name: p.read_bytes() for p in (tmp_path / "earlier-1").iterdir()}
    assert earlier.pop("metrics.json")
    assert earlier.pop("last_checkpoint") == b"model_final.pth"
    assert earlier == before


def test_a_new_run_in_a_used_folder_never_goes_on_from_the_old_one(
    run, config, tmp_path, injected
):
    injected(1)
    command = ("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path)
    options = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1)
    assert run(*command, *options, "SOLVER.MAX_ITER", 3).code == 0
    assert run(*command, *options, "SOLVER.MAX_ITER", 2).code == 0
    (tmp_path / "model_final.pth").write_bytes(b"broken")
    result = run(*command[:1], "--resume-or-start", *command[1:], *options, "SOLVER.MAX_ITER", 5)
    assert result.code == 0, result.output[-3000:]
    assert "Resumed at iteration 2 of 5" in result.output  # not at 3, of the first run
    steps = [m["iteration"] for m in read_metrics(tmp_path)]
    assert steps == sorted(set(steps))


def test_a_run_goes_on_with_its_own_classes_and_optimizer_only(run, config, tmp_path, injected):
    injected(3)
    options = ("DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path)
    assert run("train_net.py", "--config-file", config, *options).code == 0
    entry = "{name: tiny_train, type: coco, json: leaves/train.json, images: leaves/train"
    for mistake, part in (
        (("SOLVER.OPTIMIZER", "AdamW"), "SOLVER.OPTIMIZER is AdamW"),
        (("MODEL.ROI_MASK_HEAD.NUM_CONV", 2), "MODEL is not that of the run"),
        (entry, "DATASETS.CLASSES is ['blight', 'rust', 'miner', 'leaf']"),
    ):
        changed = tmp_path / "changed.yaml"
        text = config.read_text()
        if mistake is entry:
            assert entry in text
            text = text.replace(entry, f"{entry}, classes: [blight, rust, miner, leaf]")
        changed.write_text(text)
        keys = () if mistake is entry else mistake
        result = run("train_net.py", "--resume", "--config-file", changed, *options, *keys)
        assert result.code == 1 and "Traceback" not in result.output, result.output[-3000:]
        assert part in result.last_line and "another OUTPUT_DIR" in result.last_line
