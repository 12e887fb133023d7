"""C2SSL, the self-supervised container/content task beside a box head.

Thesis section 2.7, eq. 2.13 to 2.16: is a leaf sick, that is, does it contain a disease; does a
disease lie inside a leaf? The targets follow from the ground-truth boxes during training; at
inference the branch does not run. Eq. 2.13 is misprinted: IoF, here, is the share of the CONTENT's
box that lies inside the container's (the published code).

Shape shorthand: R RoIs of all images, P boxes and G objects of one image, K classes, D features.
"""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.boxes import pairwise_intersection
from torch import Tensor, nn
from torch.nn import functional as F

SITUATIONS = ("healthy", "sick", "isolated", "inside")
HEALTHY, SICK, ISOLATED, INSIDE = range(4)
IGNORED = -1
# The situations that each mode trains.
MODES = {
    "both": (HEALTHY, SICK, ISOLATED, INSIDE),
    "container": (HEALTHY, SICK),
    "content": (ISOLATED, INSIDE),
}


def relate(groups: Sequence[dict], classes: Sequence[str]) -> Tensor:
    """Which class contains which.

    Args:
        groups: each {"containers": names, "contents": names}.
        classes: the K class names.

    Returns:
        (K + 1, K + 1) bool, True at [container, content]; the background relates to nothing.

    Raises:
        ValueError: naming ``MODEL.C2SSL.GROUPS``: a malformed group, an unknown name, or a class
            that is a container and a content.
    """
    key, index = "MODEL.C2SSL.GROUPS", {name: i for i, name in enumerate(classes)}
    # On the CPU also where a model is built on the meta device, to count its parameters.
    related = torch.zeros(len(classes) + 1, len(classes) + 1, dtype=torch.bool, device="cpu")
    for group in groups:
        if not isinstance(group, dict) or set(group) != {"containers", "contents"}:
            raise ValueError(
                f"{key} is a list of {{containers: [names], contents: [names]}}, got {group!r}"
            )
        for names in group.values():
            is_list = isinstance(names, (list, tuple)) and len(names) > 0
            if not is_list or any(not isinstance(n, str) or n not in index for n in names):
                raise ValueError(
                    f"{key} needs lists of class names, got {names!r}; the classes are "
                    f"{list(classes)}"
                )
        for container in group["containers"]:
            related[index[container], [index[name] for name in group["contents"]]] = True
    both = related.any(dim=0) & related.any(dim=1)
    if both.any():
        names = [classes[i] for i in both.nonzero()[:, 0].tolist()]
        raise ValueError(f"{key}: {names} cannot be containers and contents")
    return related


def box_shares(boxes: Boxes, objects: Boxes, is_container: Tensor) -> Tensor:
    """IoF (P, G) of each box with each object: their intersection over the content's area.

    Args:
        boxes, objects: in the same frame.
        is_container: (P,) whether the box is a container (the object is then the content).
    """
    content = torch.where(is_container[:, None], objects.area()[None], boxes.area()[:, None])
    return pairwise_intersection(boxes, objects) / content.clamp(min=1e-6)


def mask_shares(
    masks: BitMasks | PolygonMasks, size: tuple[int, int], is_container: Tensor
) -> Tensor:
    """(G, G) the share of the column's mask that the row's mask covers; 0 in other rows.

    Args:
        masks: of the G objects.
        size: height and width of the image in pixels.
        is_container: (G,) the rows to compute.
    """
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *size).to(is_container.device)
    bitmaps = masks.tensor.flatten(1)
    shares = torch.zeros(len(bitmaps), len(bitmaps), device=bitmaps.device)
    for row in is_container.nonzero()[:, 0].tolist():  # few, and one large intermediate at a time
        shares[row] = (bitmaps & bitmaps[row]).sum(dim=1) / bitmaps.sum(dim=1).clamp(min=1)
    return shares


def situations(
    shares: Tensor, boxes: Tensor, objects: Tensor, related: Tensor, mu: float
) -> Tensor:
    """The target of each box (eq. 2.14).

    Args:
        shares: (P, G) of the content inside the container, see :func:`box_shares`.
        boxes: (P,) class of the object each box is matched to, in [0, K]; K is background.
        objects: (G,) classes of the image's objects.
        related: (K + 1, K + 1), see :func:`relate`.
        mu: from this largest share on a content lies inside.

    Returns:
        (P,) int64: ``HEALTHY`` or ``SICK`` for containers, ``ISOLATED`` or ``INSIDE`` for
        contents, ``IGNORED`` for all else.
    """
    shares = shares.masked_fill(~(related | related.T)[boxes][:, objects], 0.0)
    # Without a single object there is no largest share, and nothing is inside.
    inside = (F.pad(shares, (0, 1)).amax(dim=1) >= mu).long()
    target = torch.full_like(boxes, IGNORED)
    target = torch.where(related.any(dim=1)[boxes], HEALTHY + inside, target)
    return torch.where(related.any(dim=0)[boxes], ISOLATED + inside, target)


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights that sum to 1 and fall with a class' share: ``(1 - p) / (n - 1)`` (eq. 2.16).

    Args:
        counts: (n,) how often each class was a target.
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    if not counts.any():
        shares = torch.full_like(shares, 1 / len(counts))
    return ((1 - shares) / (len(counts) - 1)).float()


class ContainmentHead(nn.Module):
    """One linear layer on a box head's output, and its targets and loss.

    Mode "both" has four classes and a weighted softmax focal loss; "container" and "content" train
    their situation alone with one logit, the probability that nothing is contained, and a sigmoid
    focal loss.

    Differs from the published code: "container" and "content" compare with the other kind (there
    they compare with their own, so that every target is 0); without a usable sample the loss is 0
    instead of missing.

    Args:
        in_features: D.
        related: (K + 1, K + 1), see :func:`relate`.
        mode: a key of ``MODES``.
        mu: see :func:`situations`.
        gamma: of the focal loss; 0 is weighted cross-entropy.
        class_weights: of the four situations; empty: :func:`balanced_weights` of all targets so
            far.
        alpha: weight of "nothing is contained" in the other modes, 1 - alpha that of the rest.
        loss_weight: of the result.
        use_masks: containment between the objects' masks instead of the box with the objects.
    """

    summed_buffers = ("counts",)  # what several processes have counted is to be added up

    @configurable
    def __init__(
        self,
        *,
        in_features: int,
        related: Tensor,
        mode: str = "both",
        mu: float = 0.45,
        gamma: float = 1.5,
        class_weights: tuple[float, ...] = (),
        alpha: float = 0.96,
        loss_weight: float = 1.0,
        use_masks: bool = False,
    ) -> None:
        super().__init__()
        self.logits = nn.Linear(in_features, 4 if mode == "both" else 1)
        self.register_buffer("related", related, persistent=False)
        self.has_groups = bool(related.any())
        self.used = MODES[mode]
        self.mu = mu
        self.gamma = gamma
        # Buffers go to the device once, not in every step.
        self.register_buffer("class_weights", torch.tensor(class_weights), persistent=False)
        self.alpha = alpha
        self.loss_weight = loss_weight
        self.use_masks = use_masks
        # In checkpoints, so that a resumed run weighs as an uninterrupted one.
        self.register_buffer("counts", torch.zeros(4, dtype=torch.long))

    @classmethod
    def from_config(cls, cfg: CfgNode, *, in_features: int) -> dict:
        """Read ``MODEL.C2SSL`` and, for the names in its groups, ``DATASETS.CLASSES``."""
        node, key = cfg.MODEL.C2SSL, "MODEL.C2SSL"
        if node.MODE not in MODES:
            raise ValueError(f"{key}.MODE is one of {list(MODES)}, got {node.MODE!r}")
        if not 0 < node.THRESHOLD <= 1:
            raise ValueError(f"{key}.THRESHOLD is a share in (0, 1], got {node.THRESHOLD}")
        if node.GAMMA < 0 or not 0 <= node.ALPHA <= 1:
            raise ValueError(
                f"{key}.GAMMA is 0 or more and ALPHA in [0, 1], got {node.GAMMA} and {node.ALPHA}"
            )
        weights = tuple(node.CLASS_WEIGHTS)
        if len(weights) not in (0, 4) or any(weight < 0 for weight in weights):
            raise ValueError(f"{key}.CLASS_WEIGHTS has four weights or none, got {weights}")
        if node.MASKS and not cfg.MODEL.MASK_ON:
            raise ValueError(f"{key}.MASKS needs masks: set MODEL.MASK_ON True")
        return {
            "in_features": in_features,
            "related": _configured_relation(cfg),
            "mode": node.MODE,
            "mu": node.THRESHOLD,
            "gamma": node.GAMMA,
            "class_weights": weights,
            "alpha": node.ALPHA,
            "loss_weight": node.LOSS_WEIGHT,
            "use_masks": node.MASKS,
        }

    @torch.no_grad()
    def assign(self, samples: list[Instances], targets: list[Instances]) -> None:
        """Give the sampled boxes of each image their ``situation`` (P,).

        Args:
            samples: ``proposal_boxes``, ``gt_classes`` and, for masks, ``gt_index``.
            targets: the image's objects: ``gt_boxes``, ``gt_classes`` and, for masks, ``gt_masks``.

        Raises:
            ValueError: there are no groups.
        """
        if not self.has_groups:
            raise ValueError(
                "MODEL.C2SSL.ENABLED trains nothing: DATASETS.CLASSES is empty or MODEL.C2SSL."
                'GROUPS is still "auto"; train_net.py sets both from the data'
            )
        is_container, is_content = self.related.any(dim=1), self.related.any(dim=0)
        for sample, target in zip(samples, targets, strict=True):
            matched, objects = sample.gt_classes, target.gt_classes
            if self.use_masks and target.has("gt_masks") and len(target):
                covered = mask_shares(target.gt_masks, target.image_size, is_container[objects])
                # A container asks what it covers, a content what covers it.
                by_container, by_content = covered[sample.gt_index], covered.T[sample.gt_index]
                shares = torch.where(is_content[matched][:, None], by_content, by_container)
            else:
                shares = box_shares(sample.proposal_boxes, target.gt_boxes, is_container[matched])
            sample.situation = situations(shares, matched, objects, self.related, self.mu)

    def forward(self, features: Tensor, samples: list[Instances]) -> Tensor:
        """The loss of all images' sampled boxes, a scalar in fp32.

        The usable positives' sum, divided by R, positives and negatives.

        Args:
            features: the box head's output (R, D) or (R, C, H, W).
            samples: with ``situation``, see :meth:`assign`.
        """
        logits = self.logits(features.flatten(start_dim=1)).float()
        target = torch.cat([sample.situation for sample in samples])
        usable = (target >= self.used[0]) & (target <= self.used[-1])
        target = torch.where(usable, target, self.used[0])
        if len(self.used) == 4:
            entropy = F.cross_entropy(logits, target, reduction="none")
            weights = self._weights(target, usable)[target]
        else:
            free = (target == self.used[0]).float()
            entropy = F.binary_cross_entropy_with_logits(logits[:, 0], free, reduction="none")
            weights = torch.where(free > 0, self.alpha, 1 - self.alpha)
        # expm1 keeps 1 - p exact near 1; the floor keeps the gradient finite at p = 1.
        focus = (-torch.expm1(-entropy)).clamp(min=1e-12) ** self.gamma
        losses = torch.where(usable, weights * focus * entropy, 0.0)
        return self.loss_weight * losses.sum() / max(len(target), 1)

    @torch.no_grad()
    def _weights(self, target: Tensor, usable: Tensor) -> Tensor:
        if len(self.class_weights):
            return self.class_weights
        # bincount would ask the device for the largest target.
        counts = torch.stack([((target == i) & usable).sum() for i in range(4)])
        # Of this process: the trainer adds up those of all between the steps, because an exchange
        # in the forward pass could wait for ever for a process whose pass has failed.
        self.counts += counts
        return balanced_weights(self.counts)


def resolve_groups(cfg: CfgNode, infer: Callable[[float], list[dict]]) -> None:
    """Replace ``MODEL.C2SSL.GROUPS: "auto"`` by what the data show.

    Args:
        cfg: changed in place.
        infer: gives the groups for ``MODEL.C2SSL.AUTO_SHARE``; ValueError without any.
    """
    node = cfg.MODEL.C2SSL
    if node.ENABLED and node.GROUPS == "auto":
        try:
            node.GROUPS = infer(node.AUTO_SHARE)
        except ValueError as error:
            raise ValueError(f"MODEL.C2SSL.GROUPS auto: {error} (AUTO_SHARE)") from error


def build_containment_head(cfg: CfgNode, in_features: int) -> ContainmentHead | None:
    """The branch, or None without ``MODEL.C2SSL.ENABLED``."""
    return ContainmentHead(cfg, in_features=in_features) if cfg.MODEL.C2SSL.ENABLED else None


def _configured_relation(cfg: CfgNode) -> Tensor:
    classes, groups = tuple(cfg.DATASETS.get("CLASSES", ())), cfg.MODEL.C2SSL.GROUPS
    number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if not classes or groups == "auto":  # to count parameters, or to predict
        return torch.zeros(number + 1, number + 1, dtype=torch.bool, device="cpu")
    if not isinstance(groups, (list, tuple)) or not groups:
        raise ValueError(
            "MODEL.C2SSL.ENABLED needs MODEL.C2SSL.GROUPS: \"auto\" or a list; in a YAML file "
            "[{containers: [leaf], contents: [rust]}], on the command line with quoted names, "
            f"\"[{{'containers': ['leaf'], 'contents': ['rust']}}]\"; got {groups!r}"
        )
    return relate(groups, classes)
