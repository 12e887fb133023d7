"""The container/content task and the RoI statistics in a run as a user starts it."""

import json

import yaml

ON = ("MODEL.C2SSL.ENABLED", "True", "MODEL.C2SSL.GROUPS", "auto")


def test_groups_are_inferred_logged_and_kept(run, config, tmp_path):
    """The generated spots lie on leaves, most of them."""
    result = run(
        *("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path, *ON),
        *("MODEL.C2SSL.AUTO_SHARE", 0.6, "MODEL.ROI_STATISTICS_PERIOD", 1, "DATASETS.TEST", "()"),
    )
    assert result.code == 0, result.output[-3000:]
    assert "leaf contains " in result.output
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())["MODEL"]["C2SSL"]["GROUPS"]
    (group,) = kept
    assert group["containers"] == ["leaf"]
    assert set(group["contents"]) <= {"miner", "rust", "blight"} and group["contents"]
    lines = [json.loads(x) for x in (tmp_path / "roi_statistics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert list(line["loops"]) == ["1", "2", "3"]
        for counts in line["loops"].values():
            assert sum(counts["iou_histogram"]) > 0
            assert 0 < sum(counts["situations"]) <= counts["positives"] < counts["sampled"]
    metrics = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {f"loss_c2ssl_loop{t}" for t in (1, 2, 3)} <= metrics[-1].keys()
    again = run(
        *("train_net.py", "--config-file", tmp_path / "config.yaml", "--eval-only"),
        *("MODEL.WEIGHTS", tmp_path / "model_final.pth", "DATASETS.TEST", "('tiny_val',)"),
    )
    assert again.code == 0, again.output[-3000:]


def test_a_set_without_containers_is_refused(run, config, tmp_path):
    result = run(
        *("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path, *ON),
        *("MODEL.C2SSL.AUTO_SHARE", 1.01),
    )
    assert result.code == 1
    assert "error: MODEL.C2SSL.GROUPS auto: no class of" in result.output
    assert "Traceback" not in result.output
