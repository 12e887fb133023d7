"""Fixtures of the training side."""

import pytest


@pytest.fixture
def clean_catalogs(tmp_path, monkeypatch):
    """Relative paths are under tmp_path; what a test registers is gone after it."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
