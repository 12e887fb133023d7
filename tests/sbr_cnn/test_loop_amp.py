"""Mixed precision: finite fp32 losses and gradients, on the CPU and where there is a GPU."""

import pytest
import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

SIZE = (96, 128)  # of the pictures that conftest.py makes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def make_amp_heads(make_loops):
    def make(extractor: str, post: str) -> nn.Module:
        return make_loops(
            "aab",
            *("MODEL.ROI_BOX_HEAD.EXTRACTOR", extractor),
            *("MODEL.ROI_MASK_HEAD.EXTRACTOR", extractor),
            *("MODEL.GROIE.POST", post, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        )

    return make


@pytest.fixture
def half_step(make_maps, make_proposals, make_targets):
    """``half_step(heads, device, dtype)``: losses and feature maps of a step under autocast.

    The maps are what a backbone under autocast gives: tensors of ``dtype``.
    """

    def step(
        heads: nn.Module, device: str, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        maps = {
            name: x.to(device, dtype).requires_grad_() for name, x in make_maps().items()
        }
        images = ImageList(torch.zeros(2, 3, *SIZE, device=device), [SIZE] * 2)
        proposals = [p.to(device) for p in make_proposals(30, 30)]
        targets = [t.to(device) for t in make_targets(3, 0)]
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            losses = heads.to(device).train()(images, maps, proposals, targets)[1]
        return losses, list(maps.values())

    return step


def check_step(heads: nn.Module, losses: dict[str, Tensor], maps: list[Tensor]) -> None:
    assert len(losses) == 9
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert all(x.grad.isfinite().all() for x in maps)


def check_detections(heads: nn.Module, maps: list[Tensor], proposals: list, device: str) -> None:
    images = ImageList(torch.zeros(2, 3, *SIZE, device=device), [SIZE] * 2)
    names = heads.in_features
    with torch.no_grad(), torch.autocast(device, dtype=maps[0].dtype):
        found, _ = heads.eval()(images, dict(zip(names, maps, strict=True)), proposals)
    assert sum(map(len, found))
    for image in found:
        assert image.pred_boxes.tensor.dtype == torch.float32
        assert image.scores.isfinite().all() and image.pred_masks.isfinite().all()


dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
EXTRACTORS = [("single", "none"), ("groie", "non_local"), ("groie", "attention")]


@pytest.mark.usefixtures("storage")
@dtypes
@pytest.mark.parametrize(("extractor", "post"), EXTRACTORS)
def test_half_precision_on_the_cpu(
    extractor, post, dtype, make_amp_heads, half_step, make_proposals
):
    heads = make_amp_heads(extractor, post)
    losses, maps = half_step(heads, "cpu", dtype)
    check_step(heads, losses, maps)
    check_detections(heads, maps, make_proposals(20, 0), "cpu")


@pytest.mark.usefixtures("storage")
def test_bf16_losses_are_close_to_fp32(make_loops, half_step):
    """One loop, all candidates: no draw and no refinement depends on rounding."""
    keys = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0)
    heads = make_loops("a", *keys, "MODEL.ROI_LOOP_HEAD.INTERLEAVED", False)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        results.append(half_step(heads, "cpu", dtype)[0])
    exact, rounded = results
    for name, loss in exact.items():
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.02), name


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("storage")
@dtypes
@pytest.mark.parametrize(("extractor", "post"), EXTRACTORS)
def test_half_precision_on_the_gpu(
    extractor, post, dtype, make_amp_heads, half_step, make_proposals
):
    heads = make_amp_heads(extractor, post)
    losses, maps = half_step(heads, "cuda", dtype)
    check_step(heads, losses, maps)
    check_detections(heads, maps, [p.to("cuda") for p in make_proposals(20, 0)], "cuda")
