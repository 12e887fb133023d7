"""Starts that fail: what an earlier run has left stays as it is."""


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
