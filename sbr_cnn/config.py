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
    # Heads of POST (or PRE) "attention" in the box and in the mask (or grid) extractor.
    cfg.MODEL.GROIE.ATTENTION_HEADS = (6, 6)

    cfg.MODEL.FCC = CfgNode()
    # FCCBoxHead's convolutions in place of the two FC layers, C -> C/2 -> C/4: "square" (7x7, the
    # thesis' versions b and d), "rect" (7x3 then 3x7, narrower in the second of a pair: c and e),
    # "rect_early" (narrower in the first: e').
    cfg.MODEL.FCC.LAYERS = "square"
    # A 7x7 non-local block before (NLb) and after (NLa) the convolutions.
    cfg.MODEL.FCC.NON_LOCAL_BEFORE = False
    cfg.MODEL.FCC.NON_LOCAL_AFTER = False

    cfg.MODEL.MASK_IOU_HEAD = CfgNode()
    # Predict each mask's IoU and rescale its score, for mask AP only (Mask Scoring R-CNN).
    cfg.MODEL.MASK_IOU_HEAD.ENABLED = False
    # Layers after the four convolutions: "fc" (two of 1024, the original) or FCC's, as above.
    cfg.MODEL.MASK_IOU_HEAD.LAYERS = "fc"
    cfg.MODEL.MASK_IOU_HEAD.NON_LOCAL_BEFORE = False
    cfg.MODEL.MASK_IOU_HEAD.NON_LOCAL_AFTER = False
    cfg.MODEL.MASK_IOU_HEAD.LOSS_WEIGHT = 0.5
    # Where a predicted mask begins in the training target: a logit of 0.5 as all published code
    # compares (probability 0.62), or with False a probability of 0.5.
    cfg.MODEL.MASK_IOU_HEAD.THRESHOLD_LOGITS = True

    cfg.MODEL.GC_BLOCK = CfgNode()
    # Global-context blocks (GC-Net) in the bottlenecks of res2, res3, res4, res5, and the width
    # inside a block relative to the stage's. Deformable convolution: Detectron2's own key
    # MODEL.RESNETS.DEFORM_ON_PER_STAGE. Both are read by build_norm_resnet_fpn_backbone.
    cfg.MODEL.GC_BLOCK.ON_PER_STAGE = [False, False, False, False]
    cfg.MODEL.GC_BLOCK.RATIO = 0.25

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
    # Every mask head adds its convolution of the features fed back. False: the first pair's head
    # has none (HTC).
    cfg.MODEL.ROI_LOOP_HEAD.FIRST_FEEDBACK = True
    # Masks train on a new sample of the loop's refined boxes; False: on the box branch's sample.
    cfg.MODEL.ROI_LOOP_HEAD.INTERLEAVED = True

    cfg.MODEL.C2SSL = CfgNode()
    # The container/content task beside the box heads of LoopROIHeads and ExtractorROIHeads, in
    # training only: is a container sick, does a content lie inside one?
    cfg.MODEL.C2SSL.ENABLED = False
    # Which classes contain which, by name: a list of {containers: [leaf], contents: [rust, mould]};
    # or "auto": inferred from the training set by MODEL.C2SSL.AUTO_SHARE (a run's config.yaml has
    # what was inferred).
    cfg.MODEL.C2SSL.GROUPS = None
    # "auto": class A contains B when at least this share of B's objects lie inside one of A's.
    cfg.MODEL.C2SSL.AUTO_SHARE = 0.9
    # "both" (four situations), or one logit for "container" (healthy, sick) or "content" (isolated,
    # inside) alone.
    cfg.MODEL.C2SSL.MODE = "both"
    # Inside: from this share of the content on (the thesis' mu).
    cfg.MODEL.C2SSL.THRESHOLD = 0.45
    # Of the focal loss; 0 is weighted cross-entropy.
    cfg.MODEL.C2SSL.GAMMA = 1.5
    # "both": weights of healthy, sick, isolated, inside (LDD: 0.33, 0.29, 0.33, 0.05); (): from the
    # targets counted so far (eq. 2.16).
    cfg.MODEL.C2SSL.CLASS_WEIGHTS = ()
    # Other modes: weight of healthy or isolated; 1 - ALPHA is that of sick or inside.
    cfg.MODEL.C2SSL.ALPHA = 0.96
    cfg.MODEL.C2SSL.LOSS_WEIGHT = 1.0
    # Containment between the matched objects' masks instead of the box with the objects' boxes.
    cfg.MODEL.C2SSL.MASKS = False

    # Every so many training steps: IoU histogram of each loop's proposals, positives and counts of
    # C2SSL targets, as TensorBoard histograms and a line of roi_statistics.json; 0: off. Read by
    # LoopROIHeads and ExtractorROIHeads; pseudo labels count as objects.
    cfg.MODEL.ROI_STATISTICS_PERIOD = 0

    cfg.MODEL.TIMM = CfgNode()
    # Any timm model with features_only support; read by build_timm_fpn_backbone.
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # "fpn" over maps of strides 4 to 32, or "simple" for a plain ViT, which has stride 16 alone
    # (ViTDet; its norm is LayerNorm whatever MODEL.FPN.NORM says).
    cfg.MODEL.TIMM.PYRAMID = "fpn"

    cfg.MODEL.ROI_GRID_HEAD = CfgNode()
    # GridROIHeads' grid branch (Grid R-CNN). Its RoI extractor, with keys as MODEL.ROI_BOX_HEAD's;
    # the resolution is even, heat maps are twice as large.
    cfg.MODEL.ROI_GRID_HEAD.EXTRACTOR = "single"
    cfg.MODEL.ROI_GRID_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.ROI_GRID_HEAD.POOLER_SAMPLING_RATIO = 0
    cfg.MODEL.ROI_GRID_HEAD.POOLER_TYPE = "ROIAlignV2"
    # Convolutions, and features per grid point after them (a multiple of 4; there are 9 points).
    cfg.MODEL.ROI_GRID_HEAD.NUM_CONV = 8
    cfg.MODEL.ROI_GRID_HEAD.POINT_DIM = 64
    cfg.MODEL.ROI_GRID_HEAD.LOSS_WEIGHT = 15.0
    # Training: how far a positive's centre and sides change at random, relative to its sides
    # ([0, 1)), and the most positives per process and step.
    cfg.MODEL.ROI_GRID_HEAD.JITTER = 0.15
    cfg.MODEL.ROI_GRID_HEAD.MAX_POSITIVES = 192
