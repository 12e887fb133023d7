"""Weights: what matched is counted and told, modules may rename what is theirs, files are whole."""

import errno
import logging
import os
import pickle
import shutil
from pathlib import Path
from random import Random
from urllib.error import URLError

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from safetensors.torch import save_file
from torch import Tensor, nn

from il_net import checkpoint, checkpoint_files
from il_net.checkpoint import Checkpointer
from il_net.checkpoint_files import UnwrittenError, choose_checkpoint, damage
from il_net.safe_load import load_pth


def mlp(width: int = 4) -> nn.Sequential:
    """Ten layers of 16 weights without bias: a tensor is ten per cent of the 160 weights."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(10)))


def save(path, state: dict) -> str:
    torch.save({"model": state}, path)
    return str(path)


def without(state: dict, count: int) -> dict:
    return dict(list(state.items())[count:])


# ---- what matched ----


def test_complete_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(0)
    source, target = mlp(), mlp()
    checkpointer = Checkpointer(target)
    assert checkpointer.report is None
    checkpointer.load_complete(save(tmp_path / "w.pth", source.state_dict()))
    report = checkpointer.report
    assert (report.matched, report.total) == (160, 160)
    assert (report.matched_tensors, report.total_tensors) == (10, 10)
    assert report.missing == report.unexpected == ()
    assert report.misshapen == {}
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nested", [False, True])
def test_states_saved_inside_ddp_or_under_state_dict(tmp_path, nested):
    source, target = mlp(), mlp()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state} if nested else state, tmp_path / "w.pth")
    checkpointer = Checkpointer(target)
    checkpointer.load_complete(str(tmp_path / "w.pth"))
    assert checkpointer.report.matched == 160
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nine_of_ten_tensors_are_enough_and_eight_are_not(tmp_path):
    state = mlp().state_dict()
    checkpointer = Checkpointer(mlp())
    checkpointer.load_complete(save(tmp_path / "nine.pth", without(state, 1)))
    assert (checkpointer.report.matched, checkpointer.report.missing) == (144, ("0.weight",))
    path = save(tmp_path / "eight.pth", without(state, 2))
    with pytest.raises(ValueError) as error:
        checkpointer.load_complete(path)
    message = str(error.value)
    assert "128 of the model's 160" in message
    assert path in message
    assert "0.weight, 1.weight" in message


def test_share_that_is_asked_for_is_a_parameter(tmp_path):
    path = save(tmp_path / "half.pth", without(mlp().state_dict(), 5))
    Checkpointer(mlp()).load_complete(path, min_matched=0.5)
    with pytest.raises(ValueError, match="80 of the model's 160"):
        Checkpointer(mlp()).load_complete(path, min_matched=0.51)


def test_other_shape_is_not_matched_and_foreign_name_is_unexpected(tmp_path):
    state = mlp().state_dict()
    state["0.weight"] = torch.zeros(3, 3)
    state["head.weight"] = torch.zeros(3)
    del state["4.weight"]
    checkpointer = Checkpointer(mlp())
    checkpointer.load(save(tmp_path / "w.pth", state), checkpointables=[])
    report = checkpointer.report
    assert (report.matched, report.total) == (128, 160)
    assert (report.matched_tensors, report.total_tensors) == (8, 10)
    assert report.missing == ("4.weight",)
    assert report.misshapen == {"0.weight": ((3, 3), (4, 4))}
    assert report.unexpected == ("head.weight",)


def logged(caplog) -> tuple[int, str]:
    """Level and text of our one message, beside which nobody warns."""
    (record,) = [r for r in caplog.records if r.name == checkpoint.__name__]
    assert all(r.levelno < logging.WARNING for r in caplog.records if r is not record)
    return record.levelno, record.getMessage()


def test_one_message_tells_what_matched_and_what_did_not(tmp_path, caplog):
    state = without(mlp(40).state_dict(), 7)
    state["7.weight"] = torch.zeros(3, 3)
    state["head.weight"] = torch.zeros(3)
    with caplog.at_level(logging.INFO):
        Checkpointer(mlp(40)).load(save(tmp_path / "w.pth", state))
    level, text = logged(caplog)
    assert level == logging.WARNING
    first = "0.weight, 1.weight, 2.weight, 3.weight, 4.weight"
    assert text.splitlines() == [
        "Loaded 3,200 of the model's 16,000 weights (2 of 10 tensors)",
        f"  not found in the checkpoint: {first} and 2 more",
        "  of another shape in the checkpoint: 7.weight (3, 3) for (40, 40)",
        "  only in the checkpoint: head.weight",
    ]


def test_message_of_a_complete_checkpoint_is_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        Checkpointer(mlp()).load(save(tmp_path / "w.pth", mlp().state_dict()))
    expected = "Loaded 160 of the model's 160 weights (10 of 10 tensors)"
    assert logged(caplog) == (logging.INFO, expected)


def test_checkpoint_of_another_model_is_refused_with_names_from_both(tmp_path):
    other = {f"backbone.{k}": v for k, v in mlp().state_dict().items()}
    # Detectron2 strips a common prefix such as "module."; "backbone." of a bare model is none.
    with pytest.raises(ValueError) as error:
        Checkpointer(mlp()).load_complete(save(tmp_path / "w.pth", other))
    message = str(error.value)
    assert " 0 of the model's 160" in message
    assert "backbone." in message
    with pytest.raises(ValueError, match="0 of the model's 160"):  # nor does training start so
        Checkpointer(mlp()).load(str(tmp_path / "w.pth"))


def test_many_small_tensors_do_not_stand_for_a_large_one(tmp_path):
    """An ImageNet backbone has most of a detector's tensors, but not most of its weights."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(99)), nn.Linear(1, 99))
    path = save(tmp_path / "w.pth", dict(list(model.state_dict().items())[:99]))
    with pytest.raises(ValueError, match="99 of the model's 297"):
        Checkpointer(model).load_complete(path)


def test_counters_that_batch_norm_fills_in_are_no_weights_of_the_file(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match="0 of the model's 5"):
        Checkpointer(model).load(save(tmp_path / "w.pth", {"other": torch.zeros(1)}))


def test_empty_path():
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        Checkpointer(mlp()).load_complete("")


def test_missing_file(tmp_path):
    path = str(tmp_path / "gone.pth")
    for load in (Checkpointer(mlp()).load, Checkpointer(mlp()).load_complete):
        with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS") as error:
            load(path)
        assert path in str(error.value)


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("detectron2.checkpoint.DetectionCheckpointer.load", no_network)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS https://x/w.pth .*no network"):
        Checkpointer(mlp()).load("https://x/w.pth")


def test_training_without_weights_starts_from_scratch():
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    assert Checkpointer(model).load("") == {}
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_file_that_is_no_checkpoint(tmp_path, name):
    path = tmp_path / name
    path.write_text("these are no weights")
    with pytest.raises(ValueError, match=rf"MODEL\.WEIGHTS: .*{name} can't be read"):
        Checkpointer(mlp()).load_complete(str(path))


def test_safetensors_file(tmp_path):
    source, target = mlp(), mlp()
    path = str(tmp_path / "w.safetensors")
    save_file(without(source.state_dict(), 1), path)
    checkpointer = Checkpointer(target)
    checkpointer.load_complete(path)
    assert checkpointer.report.missing == ("0.weight",)
    for a, b in list(zip(source.parameters(), target.parameters(), strict=True))[1:]:
        assert torch.equal(a, b)


# ---- Detectron2's own files ----


def tiny_resnet() -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def save_pkl(path, state: dict, **entries: object) -> str:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "us", **entries}))
    return str(path)


def test_converted_resnet_is_matched_by_the_ends_of_its_names(tmp_path):
    """Detectron2's R-50.pkl names the ResNet's tensors without the detector's prefix."""
    torch.manual_seed(0)
    source = {name: torch.rand_like(t) for name, t in tiny_resnet().state_dict().items()}
    assert "stem.conv1.norm.running_var" in source
    model = nn.ModuleDict({"bottom_up": tiny_resnet(), "head": nn.Linear(1, 2, bias=False)})
    checkpointer = Checkpointer(model)
    state = {**source, "stem.fc.bias": torch.zeros(3)}
    checkpointer.load(save_pkl(tmp_path / "R-50.pkl", state, matching_heuristics=True))
    report = checkpointer.report
    assert (report.missing, report.unexpected) == (("head.weight",), ("stem.fc.bias",))
    assert report.matched == report.total - 2
    for name, tensor in model["bottom_up"].state_dict().items():
        assert torch.equal(tensor, source[name]), name


# ---- modules that know their tensors by other names ----


class Pair(nn.Module):
    """Takes ``old`` for its ``new``, and writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(3, 1, bias=False)
        self.asked: list[str] = []

    def adopt_state(self, state: dict[str, Tensor], prefix: str) -> None:
        self.asked.append(prefix)
        old = f"{prefix}old.weight"
        if old in state:
            assert isinstance(state[old], Tensor)
            state[f"{prefix}new.weight"] = state.pop(old)


def make_pairs() -> nn.Module:
    return nn.ModuleDict({"heads": nn.ModuleList([Pair(), Pair()]), "rest": nn.Linear(2, 1)})


@pytest.mark.parametrize("kind", ["pth", "pkl", "pkl with heuristics"])
def test_every_module_adopts_its_own_tensors(tmp_path, kind):
    state = {
        "heads.0.old.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "heads.1.old.weight": torch.tensor([[4.0, 5.0, 6.0]]),
        "rest.weight": torch.tensor([[7.0, 8.0]]),
        "rest.bias": torch.tensor([9.0]),
    }
    if kind == "pth":
        path = save(tmp_path / "w.pth", state)
    else:
        heuristics = {"matching_heuristics": True} if "heuristics" in kind else {}
        path = save_pkl(tmp_path / "w.pkl", state, **heuristics)
    model = make_pairs()
    Checkpointer(model).load_complete(path, min_matched=1.0)
    assert [head.asked for head in model["heads"]] == [["heads.0."], ["heads.1."]]
    assert model["heads"][0].new.weight.tolist() == [[1, 2, 3]]
    assert model["heads"][1].new.weight.tolist() == [[4, 5, 6]]
    assert model["rest"].weight.tolist() == [[7, 8]]


def test_the_model_itself_is_asked_without_a_prefix(tmp_path):
    model = Pair()
    path = save(tmp_path / "w.pth", {"old.weight": torch.tensor([[1.0, 2.0, 3.0]])})
    Checkpointer(model).load_complete(path)
    assert model.asked == [""]
    assert model.new.weight.tolist() == [[1, 2, 3]]


def test_adopted_tensor_of_another_shape_is_reported_and_left_out(tmp_path):
    model = make_pairs()
    before = model["heads"][0].new.weight.tolist()
    state = {"heads.0.old.weight": torch.zeros(1, 4), "heads.1.old.weight": torch.ones(1, 3)}
    checkpointer = Checkpointer(model)
    checkpointer.load(save(tmp_path / "w.pth", state))
    assert checkpointer.report.misshapen == {"heads.0.new.weight": ((1, 4), (1, 3))}
    assert checkpointer.report.missing == ("rest.bias", "rest.weight")
    assert checkpointer.report.unexpected == ()
    assert model["heads"][0].new.weight.tolist() == before
    assert model["heads"][1].new.weight.tolist() == [[1, 1, 1]]


def test_a_checkpoint_of_the_model_itself_stays_as_it_is(tmp_path):
    source, model = make_pairs(), make_pairs()
    Checkpointer(model).load_complete(save(tmp_path / "w.pth", source.state_dict()), 1.0)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


# ---- saving: whole or not at all ----


def save_step(folder, step: int, model: nn.Module | None = None, kept: int = 0) -> None:
    checkpointer = Checkpointer(model or mlp(), str(folder), kept=kept)
    checkpointer.save(f"model_{step:07d}", iteration=step)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_named_as_the_last_when_it_is_whole(tmp_path):
    model = mlp()
    save_step(tmp_path, 3, model)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    state = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert state["iteration"] == 3
    assert torch.equal(state["model"]["0.weight"], model.state_dict()["0.weight"])
    assert Checkpointer(mlp(), str(tmp_path)).has_checkpoint()


class FullDisk:
    """A file that takes ``room`` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 4000])
def test_a_full_disk_leaves_the_old_file_and_nothing_partial(tmp_path, monkeypatch, room):
    save_step(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before["model_0000003.pth"]) > 4000
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *args, **kwargs: (
            FullDisk(opened(self, mode), room)
            if "w" in mode
            else opened(self, mode, *args, **kwargs)
        ),
    )
    free = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda _: free)
    for step in (3, 4):  # a new name, and one that is there
        with pytest.raises(UnwrittenError) as error:
            save_step(tmp_path, step)
        message = str(error.value)
        assert str(tmp_path / f"model_{step:07d}.pth") in message
        assert "No space left on device; 1.5 MB are free" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_name_that_cannot_be_written_leaves_the_name_before(tmp_path, monkeypatch):
    save_step(tmp_path, 3)
    real, calls = checkpoint_files.write_whole, []

    def full_at_the_name(path, write):
        calls.append(path.name)
        if path.name == "last_checkpoint":
            raise UnwrittenError("full")
        real(path, write)

    monkeypatch.setattr(checkpoint_files, "write_whole", full_at_the_name)
    with pytest.raises(UnwrittenError):
        save_step(tmp_path, 4)
    assert calls == ["model_0000004.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_what_a_killed_process_left_does_not_stay(tmp_path):
    (tmp_path / "checkpoint.partial").write_bytes(b"half")
    save_step(tmp_path, 3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth"]


# ---- what is wrong with a file ----


def test_every_flipped_bit_that_changes_something_is_found(tmp_path):
    """torch loads most of them without a word, which is why there is a check of our own."""
    save_step(tmp_path, 3)
    path = tmp_path / "model_0000003.pth"
    whole = path.read_bytes()
    assert damage(path) == ""
    true = load_pth(str(path))["model"]
    random = Random(0)
    silent = 0
    for _ in range(300):
        bit = random.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        found = damage(path)
        try:
            loaded = load_pth(str(path))["model"]
            same = all(torch.equal(true[name], loaded[name]) for name in true)
        except (ValueError, KeyError):
            assert found, bit
        else:
            assert same or found, bit
            silent += not same
    assert silent > 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_found(tmp_path, share):
    save_step(tmp_path, 3)
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert damage(path)


def test_a_file_that_is_not_there(tmp_path):
    assert damage(tmp_path / "model_0000003.pth") == "there is no such file"


# ---- which one a run goes on from ----


def make_run(folder, *steps: int) -> None:
    for step in steps:
        save_step(folder, step)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("or_start", [False, True])
def test_the_last_one_if_it_is_whole(tmp_path, or_start):
    make_run(tmp_path, 1, 3, 5)
    assert choose_checkpoint(tmp_path, or_start) == tmp_path / "model_0000005.pth"


def test_without_one_a_run_starts_only_where_that_was_asked_for(tmp_path):
    assert choose_checkpoint(tmp_path / "new", or_start=True) is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in OUTPUT_DIR .*--resume-or-start"):
        choose_checkpoint(tmp_path / "new", or_start=False)


def test_a_damaged_one_is_named_with_the_one_before_it(tmp_path, caplog):
    make_run(tmp_path, 1, 3, 5)
    cut(tmp_path / "model_0000005.pth")
    with pytest.raises(ValueError) as error:
        choose_checkpoint(tmp_path, or_start=False)
    message = str(error.value)
    assert f"{tmp_path / 'model_0000005.pth'} is damaged" in message
    assert "model_0000003.pth, is whole: --resume-or-start goes on from that one" in message
    with caplog.at_level(logging.WARNING, checkpoint_files.__name__):
        assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000003.pth"
    assert "model_0000005.pth is damaged" in caplog.text
    assert "going on from" in caplog.text and "model_0000003.pth" in caplog.text


def test_of_several_damaged_ones_all_are_passed_over(tmp_path):
    make_run(tmp_path, 1, 3, 5)
    cut(tmp_path / "model_0000003.pth")
    (tmp_path / "model_0000005.pth").unlink()
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000001.pth"


@pytest.mark.parametrize("or_start", [False, True])
def test_where_all_are_damaged_nothing_starts_by_itself(tmp_path, or_start):
    make_run(tmp_path, 1, 3)
    cut(tmp_path / "model_0000001.pth")
    cut(tmp_path / "model_0000003.pth")
    with pytest.raises(ValueError, match="no earlier checkpoint of the run is whole"):
        choose_checkpoint(tmp_path, or_start)


def test_a_run_stopped_before_it_named_its_first_checkpoint(tmp_path):
    make_run(tmp_path, 1)
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(ValueError, match=r"last_checkpoint is missing.*model_0000001\.pth"):
        choose_checkpoint(tmp_path, or_start=False)
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000001.pth"


def test_checkpoints_of_a_longer_run_before_are_left_out(tmp_path):
    make_run(tmp_path, 1, 9, 3)  # 9 is of the run before
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000003.pth"
    cut(tmp_path / "model_0000003.pth")
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000001.pth"


def test_a_best_model_is_no_checkpoint_to_go_on_from(tmp_path):
    make_run(tmp_path, 1)
    Checkpointer(mlp(), str(tmp_path)).save("model_final")
    save(tmp_path / "model_best.pth", mlp().state_dict())
    cut(tmp_path / "model_final.pth")
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000001.pth"


# ---- how many are kept ----


def test_the_latest_are_kept(tmp_path):
    for step in (1, 3, 5, 7):
        save_step(tmp_path, step, kept=2)
    assert names(tmp_path) == ["last_checkpoint", "model_0000005.pth", "model_0000007.pth"]


def test_all_are_kept_unless_a_number_is_set(tmp_path):
    make_run(tmp_path, 1, 3, 5, 7)
    assert len(list(tmp_path.glob("model_*.pth"))) == 4


def test_the_final_and_the_best_model_and_those_of_a_longer_run_are_kept(tmp_path):
    make_run(tmp_path, 9)
    save(tmp_path / "model_best.pth", mlp().state_dict())
    for step in (1, 3, 5):
        save_step(tmp_path, step, kept=2)
    Checkpointer(mlp(), str(tmp_path), kept=2).save("model_final")
    numbered = [f"model_{step:07d}.pth" for step in (3, 5, 9)]
    assert names(tmp_path) == ["last_checkpoint", *numbered, "model_best.pth", "model_final.pth"]
    cut(tmp_path / "model_final.pth")
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000005.pth"


def test_nothing_is_deleted_for_a_checkpoint_that_is_damaged(tmp_path, monkeypatch):
    make_run(tmp_path, 1, 3)
    tag = checkpoint.tag_last

    def tag_and_flip(path):
        tag(path)
        cut(path)

    monkeypatch.setattr(checkpoint, "tag_last", tag_and_flip)
    save_step(tmp_path, 5, kept=2)
    assert choose_checkpoint(tmp_path, or_start=True) == tmp_path / "model_0000003.pth"
    assert (tmp_path / "model_0000001.pth").exists()


@pytest.mark.parametrize("kept", [-1, 1])
def test_one_alone_is_not_enough(tmp_path, kept):
    with pytest.raises(ValueError, match=rf"SOLVER\.CHECKPOINTS_KEPT is 0 .*got {kept}"):
        Checkpointer(mlp(), str(tmp_path), kept=kept)


# ---- files that could run code ----


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.pyth", "w"])
def test_weights_with_a_payload_are_not_read(tmp_path, name):
    path, content = tmp_path / name, {"model": {"w": Payload(tmp_path / "mark")}}
    if name == "w.pkl":
        path.write_bytes(pickle.dumps({**content, "__author__": "us"}))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS: .* was not read.*--trust-checkpoint"):
        Checkpointer(mlp()).load(str(path))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text"])
def test_files_without_names(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS: .*w\.pth holds a \w+, not named weig"):
        Checkpointer(mlp()).load(str(tmp_path / "w.pth"))
