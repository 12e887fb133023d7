"""Configuration keys of the architectures; everything is off by default."""

from detectron2.config import CfgNode


def add_sbr_cnn_config(cfg: CfgNode) -> None:
    """Add the keys of ``sbr_cnn`` to a Detectron2 configuration."""
    # RoI extractor of the box and of the mask branch: "single" (one level by box size, as
    # Detectron2), "random" (a random level per box and call), "groie" (all levels, MODEL.GROIE).
    # Read by ExtractorROIHeads and LoopROIHeads.
    cfg.MODEL.ROI_BOX_HEAD.EXTRACTOR = "single"
    cfg.MODEL.ROI_MASK_HEAD.EXTRACTOR = "single"

    cfg.MODEL.GROIE = CfgNode()
    # Module before and after the aggregation: "none", "conv", "rect" (7x3 then 3x7),
    # "non_local", "attention". The defaults are the thesis' second version (Table 2.19).
    cfg.MODEL.GROIE.PRE = "conv"
    cfg.MODEL.GROIE.POST = "non_local"
    # Kernel side of "conv" (1, 3, 5, 7) and "non_local" (1, 7).
    cfg.MODEL.GROIE.PRE_KERNEL = 7
    cfg.MODEL.GROIE.POST_KERNEL = 7
    # One pre-module for all levels (as all published code), or one per level.
    cfg.MODEL.GROIE.SHARE_PRE = True
    # "sum", or "concat" followed by a 1x1 convolution back to the level's width.
    cfg.MODEL.GROIE.AGGREGATE = "sum"
    # A ReLU after the pre-module on every level, even without one (section 2.1's tables).
    cfg.MODEL.GROIE.EXTRA_RELU = False

    cfg.MODEL.ROI_LOOP_HEAD = CfgNode()
    # One letter per training loop, the head pair used in it: "aaa", "aab", "abab", "abc".
    cfg.MODEL.ROI_LOOP_HEAD.ORDER = "aaa"
    # Per loop: IoU from which a proposal is positive, and the weight of the loop's losses.
    cfg.MODEL.ROI_LOOP_HEAD.IOUS = (0.5, 0.6, 0.7)
    cfg.MODEL.ROI_LOOP_HEAD.LOSS_WEIGHTS = (1.0, 0.75, 0.5)
    # Per head pair (a, b, c, ...): weights of the box coder, as MODEL.ROI_BOX_HEAD's.
    cfg.MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.30, 30.30, 14.93, 14.93),
    )
    # Loops at inference; 0 = as trained. Further loops repeat the last head pair.
    cfg.MODEL.ROI_LOOP_HEAD.TEST_LOOPS = 0
    # Mask head iterates t times in training loop t. False: once (section 2.2's published code).
    # Inference always iterates once per test loop.
    cfg.MODEL.ROI_LOOP_HEAD.MASK_LOOP = True
    # Masks train on a new sample of the loop's refined boxes; False: on the box branch's sample.
    cfg.MODEL.ROI_LOOP_HEAD.INTERLEAVED = True

    cfg.MODEL.TIMM = CfgNode()
    # Any timm model with features_only support; read by build_timm_fpn_backbone.
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
