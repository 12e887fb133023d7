"""Mutated configurations: each one works or says which key is wrong, before anything trains.

In one process, as far as ``train_net.setup`` and the building of the model go; models are built
without values, on the meta device. The mutations are the same in every run.
"""

import math
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from il_net.config import load_config
from il_net.config_checks import check_il_net_config
from il_net.data.datasets import register_datasets
from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.config_checks import check_sbr_cnn_config
from tests.e2e.runner import REPO

# A student on ResNet; together with the e2e tests' tiny detector on a timm model, most
# of the keys that our configurations set.
SEMI = """
_BASE_: {base}
MODEL: {{WEIGHTS: "", MASK_ON: False, RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}}}
DATASETS:
  REGISTER:
    - {{name: tiny_train, type: coco, json: leaves/train.json, images: leaves/train}}
    - {{name: tiny_more, type: images, images: leaves/val}}
  TRAIN: [tiny_train]
  UNLABELED: [tiny_more]
  TEST: []
"""
SMALL = {"max_examples": 50, "derandomize": True, "deadline": None, "database": None}
MUTATE = settings(suppress_health_check=list(HealthCheck), **SMALL)
NUMBERS = (-1, 0, 2, -0.5, 1.5, math.nan, math.inf)
OTHERS = ("many", None, [], {"A": 1}, True, "true", [["x"]], "2017-01-01", *NUMBERS)


@pytest.fixture(scope="module")
def tiny(config, tmp_path_factory) -> list[dict]:
    """Good configurations as nested dictionaries, without a base."""
    path = tmp_path_factory.mktemp("semi") / "semi.yaml"
    base = REPO / "configs" / "il_net" / "il_net_r50_fpn_coco10.yaml"
    path.write_text(SEMI.format(base=base))
    return [CfgNode.load_yaml_with_base(str(p)) for p in (config, path)]


@pytest.fixture(autouse=True)
def _data(datasets, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    yield
    for name in ("tiny_train", "tiny_more", "tiny_val"):
        if name in DatasetCatalog:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name, None)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "config.yaml"


def start(path: Path) -> str:
    """What a run does before its first iteration; the message of a user's mistake, or ""."""
    try:
        cfg = load_config(str(path), [], add_sbr_cnn_config)
        register_datasets(cfg)
        check_il_net_config(cfg)
        check_sbr_cnn_config(cfg)
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            build_model(cfg)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def leaves(node: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def changed(node: dict, key: tuple[str, ...], new: dict) -> dict:
    """A copy of ``node`` with ``new`` in place of the key."""
    copy = dict(node)
    if len(key) > 1:
        copy[key[0]] = changed(node[key[0]], key[1:], new)
        return copy
    del copy[key[0]]
    return {**copy, **new}


def draw_key(data: st.DataObject, configs: list[dict]) -> tuple[dict, tuple[str, ...]]:
    content = data.draw(st.sampled_from(configs), "configuration")
    return content, data.draw(st.sampled_from(sorted(leaves(content))), "key")


def test_the_configurations_are_good(tiny, path):
    for content in tiny:
        path.write_text(yaml.safe_dump(content))
        assert start(path) == ""


def test_a_key_is_missing(tiny, path, injected):
    """Every key once: what stands in for it is Detectron2's default."""
    count = 0
    for content in tiny:
        for key in leaves(content):
            path.write_text(yaml.safe_dump(changed(content, key, {})))
            message = start(path)
            assert not message or ".".join(key) in message, message
            count += 1
    injected(count)


def test_a_key_is_misspelt(tiny, path, injected):
    @MUTATE
    @given(st.data())
    def misspell(data):
        content, key = draw_key(data, tiny)
        at = data.draw(st.integers(0, len(key[-1]) - 1))
        letter = data.draw(st.sampled_from(string.ascii_letters))
        wrong = f"{key[-1][:at]}{letter}{key[-1][at:]}"
        value = content
        for name in key:
            value = value[name]
        path.write_text(yaml.safe_dump(changed(content, key, {wrong: value})))
        assert f"no configuration key {'.'.join([*key[:-1], wrong])}" in start(path)

    misspell()
    injected(SMALL["max_examples"])


@pytest.mark.parametrize("kind", ["type", "number"])
def test_a_value_is_wrong(tiny, path, injected, kind):
    @MUTATE
    @given(st.data())
    def spoil(data):
        content, key = draw_key(data, tiny)
        value = content
        for name in key:
            value = value[name]
        wrong = data.draw(st.sampled_from(OTHERS if kind == "type" else NUMBERS), "value")
        if kind == "number" and isinstance(value, list) and value:
            wrong = [wrong, *value[1:]]
        path.write_text(yaml.safe_dump(changed(content, key, {key[-1]: wrong})))
        message = start(path)
        # One message may be for two keys: "MODEL.GROIE.PRE and POST are ...".
        named = ".".join(key[:-1]) in message and key[-1] in message
        assert not message or named, message

    spoil()
    injected(SMALL["max_examples"])


@pytest.mark.parametrize("kind", ["cut", "odd"])
def test_the_text_is_damaged(tiny, path, injected, kind):
    @MUTATE
    @given(st.data())
    def damage(data):
        text = yaml.safe_dump(data.draw(st.sampled_from(tiny)))
        at = data.draw(st.integers(0, len(text)), "place")
        odd = data.draw(st.text(min_size=1, max_size=3)) if kind == "odd" else ""
        raw = f"{text[:at]}{odd}{text[at:] if kind == 'odd' else ''}"
        path.write_bytes(raw.encode("utf-8", "surrogatepass"))
        message = start(path)
        # The file and the place in it, or the key.
        assert not message or str(path) in message or re.search(r"[A-Z]+\.[A-Z]", message), message

    damage()
    injected(SMALL["max_examples"])
