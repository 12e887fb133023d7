#!/usr/bin/env python
"""Print the number of trainable parameters of a configuration's model, last, as one integer.

python tools/count_parameters.py --config-file FILE [KEY VALUE ...]
"""

import argparse

from detectron2.modeling import build_model
from torch import nn

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config


def main() -> None:
    """Build the model and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    with plain_errors():
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
            register_datasets(cfg)
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    for name, child in model.named_children():
        print(f"{name:20s} {count_trainable(child):>12,d}")
    print(count_trainable(model))


def count_trainable(module: nn.Module) -> int:
    """Numbers in the parameters that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
