#!/usr/bin/env python
"""Train or evaluate a detector: python train_net.py --config-file FILE [options] [KEY VALUE ...].

Options are Detectron2's (--help lists them); also runs under torchrun.
"""

import argparse
import logging
from functools import partial
from itertools import chain
from pathlib import Path

from il_net.check import require_detectron2

require_detectron2()

import torch  # noqa: E402  (from here on after the advice on a missing torch or detectron2)
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.engine import default_argument_parser, default_setup  # noqa: E402
from detectron2.evaluation import verify_results  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from il_net.checkpoint import Checkpointer  # noqa: E402
from il_net.config import load_config  # noqa: E402
from il_net.data.containment import infer_groups  # noqa: E402
from il_net.data.datasets import register_datasets  # noqa: E402
from il_net.data.validate import validate_datasets  # noqa: E402
from il_net.engine.il_trainer import trainer_class  # noqa: E402
from il_net.engine.launch import choose_url, launch  # noqa: E402
from il_net.errors import plain_errors  # noqa: E402
from sbr_cnn import add_sbr_cnn_config  # noqa: E402
from sbr_cnn.c2ssl import resolve_groups  # noqa: E402


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, logging, datasets and seeds of this process."""
    cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
    for name in ("il_net", "sbr_cnn"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    if cfg.MODEL.DEVICE == "cpu":
        logging.getLogger("il_net").info("Running on the CPU (no GPU, or MODEL.DEVICE: cpu)")
    if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1 and torch.cuda.is_available():
        raise ValueError(
            "MODEL.DEVICE cpu with several processes: set CUDA_VISIBLE_DEVICES= to nothing as well"
        )
    register_datasets(cfg)
    resolve_groups(cfg, partial(infer_train_groups, cfg))
    if comm.get_local_rank() == 0:
        validate_datasets(cfg)
    cfg.freeze()
    trained = Path(cfg.OUTPUT_DIR, "config.yaml")
    kept = trained.read_text() if args.eval_only and trained.is_file() else None
    default_setup(cfg, args)
    if kept is not None and comm.is_main_process():
        # Detectron2 writes config.yaml anew; that of the training says what the weights are.
        trained.rename(trained.with_name("config_eval.yaml"))
        trained.write_text(kept)
    return cfg


def infer_train_groups(cfg: CfgNode, share: float) -> list[dict]:
    """Which classes of the training set contain which; see ``infer_groups``."""
    records = chain.from_iterable(map(DatasetCatalog.get, cfg.DATASETS.TRAIN))
    return infer_groups(records, cfg.DATASETS.CLASSES, share)


def main(args: argparse.Namespace) -> dict | None:
    """Train, or with ``--eval-only`` evaluate, in one process of the job."""
    with plain_errors():
        cfg = setup(args)
    if args.eval_only:
        with plain_errors():
            trainer = trainer_class(cfg)
            model = trainer.build_model(cfg)
            checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
            resumed = args.resume and checkpointer.has_checkpoint()
            checkpointer.load_complete(
                checkpointer.get_checkpoint_file() if resumed else cfg.MODEL.WEIGHTS
            )
        results = trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    with plain_errors():
        trainer = trainer_class(cfg)(cfg)
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    """Parse the command line and start the processes of this machine."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # a free port: two runs of one user don't collide
    args = parser.parse_args()
    with plain_errors():
        url = choose_url(args.num_gpus, args.num_machines, args.dist_url)
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, url, (args,))


if __name__ == "__main__":
    invoke_main()
