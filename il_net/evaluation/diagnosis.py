"""Where a detector's difficulties lie: anchors, proposals of every loop, crowded images.

Thesis sections 2.2 and 2.3: Fig. 2.9 (ground truth that no anchor matches well), Figs. 2.8 and 2.11
(IoU of the proposals of each loop), Tables 2.7 and 2.13 (loops at test).

Shape shorthand: G objects and A anchors of one image, BINS of IoU.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, pairwise_iou
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from ..data.eval_loader import build_eval_loader
from .build import build_evaluator

BINS = 20
RESULTS = "coco_instances_results.json"
# Images by their number of objects: lower bounds of the groups.
COUNTS = (1, 2, 4, 8, 16, 32)


def iou_bins(ious: Tensor) -> Tensor:
    """The bin of width 1 / BINS of each IoU; one on an edge belongs above it, 1 to the last."""
    return (ious * BINS + 1e-4).long().clamp(max=BINS - 1)


def labelled_images(cfg: CfgNode, name: str, count: int) -> Iterator[dict]:
    """Images of a dataset as the model sees them at test, with their objects.

    Args:
        cfg: gives size and format.
        name: a registered dataset with labels.
        count: at most so many, drawn from all that have objects, always the same ones.

    Yields:
        Detectron2's model inputs with ``instances``: ``gt_boxes`` in the pixels of ``image``,
        without crowds, and ``gt_classes``.
    """
    size = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(is_train=True, augmentations=[size], image_format=cfg.INPUT.FORMAT)
    records = [r for r in DatasetCatalog.get(name) if r.get("annotations")]
    order = np.random.default_rng(0).permutation(len(records))[:count]
    for index in sorted(order):
        mapped = mapper(records[index])
        if len(mapped["instances"]):  # others have nothing but crowds
            yield mapped


def unmatched_by_anchors(model: nn.Module, images: Iterator[dict]) -> dict:
    """The share of objects with no anchor in each bin of IoU (Fig. 2.9).

    Args:
        model: a detector with Detectron2's RPN.
        images: see :func:`labelled_images`.

    Returns:
        ``objects``; ``without_anchor``: BINS shares; ``best``: counts of the objects' best IoU.
    """
    generator = model.proposal_generator.anchor_generator
    features = [model.backbone.output_shape()[f] for f in model.proposal_generator.in_features]
    without, best, objects = torch.zeros(BINS), torch.zeros(BINS, dtype=torch.long), 0
    for image in images:
        shape = model.preprocess_image([image]).tensor.shape[-2:]
        maps = [
            torch.empty(1, 1, *(-(-side // f.stride) for side in shape), device=model.device)
            for f in features
        ]
        anchors = Boxes.cat(generator(maps))
        # One object at a time: of a large picture with many objects not all IoUs fit in memory.
        for box in image["instances"].gt_boxes.to(model.device):
            ious = pairwise_iou(Boxes(box[None]), anchors)[0]
            counts = torch.bincount(iou_bins(ious), minlength=BINS).cpu()
            without += counts == 0
            best[counts.nonzero().amax()] += 1
            objects += 1
    return {
        "objects": objects,
        "without_anchor": (without / max(objects, 1)).tolist(),
        "best": best.tolist(),
    }


@torch.no_grad()
def loop_histograms(model: nn.Module, images: Iterator[dict]) -> list[list[int]]:
    """The IoU of all boxes that enter each loop (or stage) of the RoI heads at test.

    Unlike in training (Figs. 2.8 and 2.11) every loop has the same proposals, each time refined
    further, and none is sampled.

    Args:
        model: a detector in evaluation mode. Where its RoI heads have no ``box_pooler``, as
            Detectron2's ``Res5ROIHeads``, they run once, on the proposals.
        images: see :func:`labelled_images`.

    Returns:
        For each loop BINS counts of the boxes by their highest IoU with an object.
    """
    heads = model.roi_heads
    entered: list[list[Boxes]] = []
    poolers = [module for name, module in heads.named_modules() if name.endswith("box_pooler")]
    hooks = [p.register_forward_pre_hook(lambda _, args: entered.append(args[1])) for p in poolers]
    if not poolers:
        hooks = [
            heads.register_forward_pre_hook(
                lambda _, args: entered.append([p.proposal_boxes for p in args[2]])
            )
        ]
    totals: list[Tensor] = []
    try:
        for image in images:
            entered.clear()
            model.inference([image], do_postprocess=False)
            truth = image["instances"].gt_boxes.to(model.device)
            for loop, (boxes,) in enumerate(entered):
                best = pairwise_iou(truth, boxes).amax(dim=0)
                if loop == len(totals):
                    totals.append(torch.zeros(BINS, dtype=torch.long))
                totals[loop] += torch.bincount(iou_bins(best), minlength=BINS).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return [counts.tolist() for counts in totals]


def ap_by_loops(cfg: CfgNode, model: nn.Module, name: str, loops: Sequence[int]) -> dict[int, dict]:
    """Metrics with different numbers of loops at test (Tables 2.7 and 2.13).

    Args:
        cfg: ``OUTPUT_DIR`` gets the predictions with the last of the numbers.
        model: in evaluation mode, with looped RoI heads.
        name: the dataset.
        loops: numbers of loops.

    Returns:
        Number of loops to {"bbox": {"AP": ...}, ...}.
    """
    heads = model.roi_heads
    trained = heads.schedule
    results = {}
    try:
        for count in loops:
            heads.schedule = replace(trained, test_loops=count)
            results[count], _ = evaluate(cfg, model, name)
    finally:
        heads.schedule = trained
    return results


def evaluate(
    cfg: CfgNode, model: nn.Module, name: str, groups: dict[str, list] | None = None
) -> tuple[dict[str, dict], dict[str, dict]]:
    """COCO metrics of all images and, from the same predictions, AP of groups of them.

    Args:
        cfg: ``OUTPUT_DIR`` gets the predictions.
        model: in evaluation mode.
        name: the dataset.
        groups: title to image ids.

    Returns:
        {"bbox": {"AP": ...}, ...} of all images, and title to {"bbox": AP, ...}, in percent; NaN
        where there is no object, and for all images where nothing was found.
    """
    evaluator = build_evaluator(cfg, name)
    results = inference_on_dataset(model, build_eval_loader(cfg, name), evaluator)
    by_group: dict[str, dict] = {title: {} for title in groups or {}}
    folder = Path(cfg.OUTPUT_DIR, "inference", name)
    for task in results if groups else ():
        ranked = folder / "coco_instances_results_segm.json"  # where masks have their own score
        path = ranked if task == "segm" and ranked.is_file() else folder / RESULTS
        found = json.loads(path.read_text())
        for title, image_ids in groups.items():
            by_group[title][task] = _ap(evaluator.truth, found, task, image_ids)
    return results, by_group


def _ap(truth: COCO, found: list[dict], task: str, image_ids: list) -> float:
    """COCO's AP in percent over some images; 0 where nothing was found, NaN without objects."""
    objects = (a for image_id in image_ids for a in truth.imgToAnns.get(image_id, ()))
    if all(a.get("iscrowd", 0) for a in objects):
        return float("nan")
    wanted = set(image_ids)
    found = [record for record in found if record["image_id"] in wanted]
    if not found:  # pycocotools can't load an empty list
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        scoring = COCOeval(truth, truth.loadRes(found), task)
        scoring.params.imgIds = list(image_ids)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return float(scoring.stats[0]) * 100


def images_by_count(name: str) -> dict[str, list]:
    """Image ids of a dataset by their number of objects, crowds apart; none without objects.

    Returns:
        "1", "2-3", ... "32 or more" to ids; groups without images are left out.
    """
    groups: dict[str, list] = {}
    bounds = (*COUNTS, None)
    for low, high in zip(bounds, bounds[1:], strict=False):
        title = f"{low}" if high == low + 1 else f"{low}-{high - 1}" if high else f"{low} or more"
        groups[title] = []
    titles = list(groups)
    for record in DatasetCatalog.get(name):
        number = sum(not a.get("iscrowd", 0) for a in record.get("annotations", ()))
        if number:
            index = int(np.searchsorted(COUNTS, number, side="right")) - 1
            groups[titles[index]].append(record["image_id"])
    return {title: ids for title, ids in groups.items() if ids}
