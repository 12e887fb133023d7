"""The ResNet: where its blocks stand, what is frozen, BatchNorm over processes, mixed precision."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from sbr_cnn.resnet import ContextConv2d, CpuSyncBatchNorm2d, DeformConv2d, build_resnet

RGB = ShapeSpec(channels=3)
STAGES = ["res2", "res3", "res4", "res5"]
LATE = [False, True, True, True]
GC = ("MODEL.GC_BLOCK.ON_PER_STAGE", LATE)
DCN = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", LATE)
BLOCKS = {"none": (), "gc": GC, "dcn": DCN, "gc+dcn": GC + DCN}
SMALL = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16)
SMALL += ("MODEL.RESNETS.WIDTH_PER_GROUP", 4)

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def make_resnet(make_config) -> Callable[..., ResNet]:
    """``make_resnet(KEY, VALUE, ...)``: a narrow ResNet-50 with res2 frozen."""

    def make(*opts, size: tuple = SMALL) -> ResNet:
        common = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.OUT_FEATURES", STAGES)
        return build_resnet(make_config(*common, *size, *opts), RGB)

    return make


@pytest.fixture
def make_random(make_resnet, randomize) -> Callable[..., ResNet]:
    """The same with random weights and offsets everywhere, those that start at zero too."""

    def make(*opts) -> ResNet:
        network = randomize(make_resnet(*opts))
        for layer in network.modules():
            if isinstance(layer, nn.LayerNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
        return network

    return make


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Blocks ----


def test_parameter_counts(make_resnet):
    with torch.device("meta"):
        counts = {name: trainable(make_resnet(*opts, size=())) for name, opts in BLOCKS.items()}
        network = make_resnet(*GC, size=())
    added = {name: count - counts["none"] for name, count in counts.items()}
    # Methods 9.3 and 9.4.
    assert added == {"none": 0, "gc": 10_000_909, "dcn": 580_842, "gc+dcn": 10_581_751}
    for name, length, count in (("res3", 4, 132_481), ("res4", 6, 527_105), ("res5", 3, 2_102_785)):
        stage = getattr(network, name)
        assert [trainable(block.conv3.context) for block in stage] == [count] * length


def test_blocks_stand_where_asked(make_resnet):
    network = make_resnet(
        *("MODEL.GC_BLOCK.ON_PER_STAGE", [False, True, False, True]),
        *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]),
    )
    found = {
        name: {(isinstance(b.conv3, ContextConv2d), isinstance(b.conv2, DeformConv2d)) for b in s}
        for name, s in zip(network.stage_names, network.stages, strict=True)
    }
    expected = [(False, False), (True, False), (False, True), (True, True)]
    assert found == {name: {kinds} for name, kinds in zip(STAGES, expected, strict=True)}


def test_global_context_comes_before_the_shortcut_is_added(make_random):
    block = make_random(*GC).res3[0]
    x = torch.randn(1, 16, 16, 16)
    inner = block.conv2(block.conv1(x).relu()).relu()
    branch = F.conv2d(inner, block.conv3.weight)
    branch = block.conv3.context(block.conv3.norm(branch))
    torch.testing.assert_close(block(x), (branch + block.shortcut(x)).relu())


@pytest.mark.parametrize("blocks", ["gc", "dcn", "gc+dcn"])
def test_a_plain_networks_weights_load_and_give_its_output(blocks, make_random, make_resnet):
    plain, network = make_random(), make_resnet(*BLOCKS[blocks])
    for name, buffer in plain.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    state = network.state_dict()
    added = set(state) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(state)
    assert {part for name in added for part in ("context", "offset") if f".{part}." in name} == {
        part for part, key in (("context", "gc"), ("offset", "dcn")) if key in blocks
    }
    # As Detectron2 matches the names of downloaded weights: by their ends.
    matched = align_and_update_state_dicts(state, plain.state_dict(), c2_conversion=False)
    assert set(matched) == set(plain.state_dict())
    missing, unexpected = network.load_state_dict(matched, strict=False)
    assert set(missing) == added and not unexpected
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, out in plain(x).items():
            torch.testing.assert_close(network(x)[name], out)


def test_layers_with_blocks_start_as_detectron2s(make_resnet):
    """Kaiming's variance by fan-out, which torch's own default is not."""
    block = make_resnet(*GC, *DCN).res5[0]
    for conv, fan_out in ((block.conv2, 9 * 32), (block.conv3, 128)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("norm", ["FrozenBN", "FrozenStatsBN", "SyncBN"])
def test_gradients_reach_the_blocks(norm, make_random):
    network = make_random(*GC, *DCN, "MODEL.RESNETS.NORM", norm).train()
    sum(out.square().mean() for out in network(torch.randn(2, 3, 64, 64)).values()).backward()
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    added = [name for name in parameters if ".offset." in name or ".context." in name]
    assert len(added) == 13 * 2 + 13 * 8
    for name in added:
        assert parameters[name].grad.any() or name.endswith("attention.bias"), name


# ---- Freezing and BatchNorm ----


@pytest.mark.parametrize("norm", ["FrozenBN", "FrozenStatsBN", "SyncBN"])
@pytest.mark.parametrize("freeze_at", [0, 2, 4])
def test_frozen_stages_are_frozen_with_their_blocks(norm, freeze_at, make_resnet):
    keys = ("MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    network = make_resnet(*GC, *DCN, *keys)
    for number, stage in enumerate([network.stem, *network.stages], start=1):
        frozen = number <= freeze_at
        assert {p.requires_grad for p in stage.parameters()} == {not frozen}
        if frozen:
            assert not any(isinstance(m, nn.BatchNorm2d) for m in stage.modules())


def test_synchronised_batchnorm_learns_statistics_where_not_frozen(make_resnet):
    network = make_resnet("MODEL.RESNETS.NORM", "SyncBN")
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def changed() -> set[str]:
        return {name for name, b in network.named_buffers() if not torch.equal(b, before[name])}

    x = torch.randn(2, 3, 64, 64)
    network.eval()(x)
    assert changed() == set()
    network.train()(x)
    late = {name for name in before if name.split(".")[0] in ("res3", "res4", "res5")}
    assert changed() == late and len(late) == 3 * (13 * 3 + 3)  # with the step counters
    assert any(isinstance(m, FrozenBatchNorm2d) for m in network.res2.modules())


def test_synchronised_batchnorm_is_torchs_off_the_cpu(make_resnet):
    keys = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.DEVICE")
    for device, kind in (("cuda", nn.SyncBatchNorm), ("cpu", CpuSyncBatchNorm2d)):
        assert type(make_resnet(*keys, device).res3[0].conv1.norm) is kind


def run_rank(rank: int, folder: Path) -> None:
    """One of two processes: a step on half of the batch, and BatchNorm of a far-off mean."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    network, x, far = torch.load(folder / "input.pt", weights_only=False)
    half = slice(2 * rank, 2 * rank + 2)
    outputs = step(network, x[half])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normal = CpuSyncBatchNorm2d(far.shape[1])(far[half])
    gradient = network.res3[0].conv2.offset.weight.grad
    torch.save((outputs, dict(network.named_buffers()), gradient, normal), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def step(network: ResNet, x: Tensor) -> dict[str, Tensor]:
    outputs = network(x)
    sum(out.square().sum() for out in outputs.values()).backward()
    return {name: out.detach() for name, out in outputs.items()}


def test_two_processes_normalise_as_one(tmp_path, make_random):
    network = make_random(*GC, *DCN, "MODEL.RESNETS.NORM", "SyncBN").train()
    x = torch.randn(4, 3, 64, 64)
    far = (30 + torch.randn(4, 2, 8, 8)).bfloat16()
    torch.save((copy.deepcopy(network), x, far), tmp_path / "input.pt")
    torch.multiprocessing.spawn(run_rank, args=(tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    seen = {}
    for name, layer in network.named_modules():
        if isinstance(layer, CpuSyncBatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].detach()})
            )
    for name, out in step(network, x).items():
        together = torch.cat([outputs[name] for outputs, *_ in ranks])
        torch.testing.assert_close(together, out, rtol=1e-3, atol=1e-3)
    gradient = network.res3[0].conv2.offset.weight.grad
    halves = ranks[0][2] + ranks[1][2]
    assert (halves - gradient).norm() < 1e-3 * gradient.norm()
    for _, buffers, *_ in ranks:
        for name, values in seen.items():
            # Momentum 0.1 from mean 0 and variance 1; the statistics of the whole batch.
            mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=False)
            close = {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(buffers[f"{name}.running_mean"], 0.1 * mean, **close)
            torch.testing.assert_close(buffers[f"{name}.running_var"], 0.9 + 0.1 * var, **close)
    # In bf16 the mean of squares, about 901, is rounded to a multiple of 4.
    normal, far = torch.cat([ranks[0][3], ranks[1][3]]), far.float()
    expected = (far - far.mean((0, 2, 3), keepdim=True)) / far.std((0, 2, 3), keepdim=True)
    assert normal.dtype == torch.bfloat16
    torch.testing.assert_close(normal.float(), expected, rtol=0.02, atol=0.02)


# ---- Mixed precision ----


def check_half_precision(network: ResNet, device: str, dtype: torch.dtype) -> None:
    """Maps close to those of fp32, gradients for all that trains."""
    x = torch.randn(2, 3, 96, 128, device=device)
    network = network.to(device).train()
    with torch.no_grad():
        exact = network(x)
    with torch.autocast(device, dtype=dtype):
        outputs = network(x)
    sum(out.float().square().mean() for out in outputs.values()).backward()
    for name, out in outputs.items():
        assert out.dtype == dtype
        # bf16 rounds by up to 0.4 %, in some 50 layers that follow each other.
        assert (out - exact[name]).norm() < 0.2 * exact[name].norm(), name
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@dtypes
@pytest.mark.parametrize("norm", ["FrozenStatsBN", "SyncBN"])
def test_half_precision_on_the_cpu(norm, dtype, make_random):
    check_half_precision(make_random(*GC, *DCN, "MODEL.RESNETS.NORM", norm), "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@pytest.mark.parametrize("norm", ["FrozenStatsBN", "SyncBN"])
def test_half_precision_on_the_gpu(norm, dtype, make_random):
    keys = ("MODEL.RESNETS.NORM", norm, "MODEL.DEVICE", "cuda")
    check_half_precision(make_random(*GC, *DCN, *keys), "cuda", dtype)


# ---- What cannot be built ----


@pytest.mark.parametrize(
    ("opts", "match"),
    [
        ((*GC, "MODEL.RESNETS.DEPTH", 18), r"GC_BLOCK.ON_PER_STAGE.*RESNETS.DEPTH 18"),
        ((*DCN, "MODEL.RESNETS.DEPTH", 34), r"DEFORM_ON_PER_STAGE.*RESNETS.DEPTH 34"),
        ((*DCN, "MODEL.RESNETS.DEFORM_MODULATED", True), "MODEL.RESNETS.DEFORM_MODULATED.*False"),
        ((*DCN, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2), "DEFORM_NUM_GROUPS is 2.*1"),
        (("MODEL.GC_BLOCK.ON_PER_STAGE", [True, True]), "GC_BLOCK.ON_PER_STAGE has four values"),
        ((*GC, "MODEL.GC_BLOCK.RATIO", 0.001), "MODEL.GC_BLOCK.RATIO 0.001 of 32 channels"),
    ],
)
def test_refused(opts, match, make_resnet):
    with pytest.raises(ValueError, match=match):
        make_resnet(*opts)


def test_detectron2s_keys_for_deformable_convolution_are_free_without_it(make_resnet):
    make_resnet("MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2)
