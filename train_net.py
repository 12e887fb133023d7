#!/usr/bin/env python
"""Train or evaluate a detector: python train_net.py --config-file FILE [options] [KEY VALUE ...].

Options are Detectron2's and a few more (--help lists them); also runs under torchrun. A run that
SIGTERM or SIGINT has stopped exits with code 75: the same command with --resume goes on.
"""

import argparse
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from il_net.check import require_detectron2

require_detectron2()

import torch  # noqa: E402  (from here on after the advice on a missing torch or detectron2)
from detectron2.config import CfgNode  # noqa: E402
from detectron2.engine import default_argument_parser, default_setup  # noqa: E402
from detectron2.evaluation import verify_results  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from il_net.checkpoint import Checkpointer  # noqa: E402
from il_net.checkpoint_files import set_aside  # noqa: E402
from il_net.config import load_config  # noqa: E402
from il_net.config_checks import check_il_net_config  # noqa: E402
from il_net.data.coco_file import parsed_once  # noqa: E402
from il_net.data.containment import infer_groups  # noqa: E402
from il_net.data.datasets import register_datasets  # noqa: E402
from il_net.data.shared_records import once_per_machine  # noqa: E402
from il_net.data.split import split_records, train_records  # noqa: E402
from il_net.data.validate import validate_datasets  # noqa: E402
from il_net.engine.il_trainer import trainer_class  # noqa: E402
from il_net.engine.launch import choose_url, launch  # noqa: E402
from il_net.engine.preemption import relayed_signals  # noqa: E402
from il_net.engine.resumable import choose_seed, choose_start  # noqa: E402
from il_net.errors import plain_errors  # noqa: E402
from il_net.safe_load import add_trust_option, trust_checkpoints  # noqa: E402
from sbr_cnn import add_sbr_cnn_config  # noqa: E402
from sbr_cnn.c2ssl import resolve_groups  # noqa: E402
from sbr_cnn.config_checks import check_sbr_cnn_config  # noqa: E402

NEW_CONFIG = "config_new.yaml"  # of a training that has not begun yet


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, logging, datasets, start and seeds of this process.

    Afterwards ``args.resume`` says whether there is a checkpoint to go on from.
    """
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
    check_il_net_config(cfg, eval_only=args.eval_only)
    check_sbr_cnn_config(cfg)
    once_per_machine(partial(validate_datasets, cfg))
    if not args.eval_only:
        resolve_groups(cfg, partial(infer_train_groups, cfg))
    if args.resume:
        args.resume = choose_start(cfg.OUTPUT_DIR, args.resume_or_start)
    if not args.eval_only:
        cfg.SEED = choose_seed(cfg, args.resume)
    cfg.freeze()
    trained = Path(cfg.OUTPUT_DIR, "config.yaml")
    kept = trained.read_text() if trained.is_file() else None
    default_setup(cfg, args)
    if kept is not None and comm.is_main_process():
        # Detectron2 writes config.yaml anew; what the folder's weights were trained with stays as
        # long as nothing else is trained there.
        trained.rename(trained.with_name("config_eval.yaml" if args.eval_only else NEW_CONFIG))
        trained.write_text(kept)
    return cfg


def infer_train_groups(cfg: CfgNode, share: float) -> list[dict]:
    """Which classes of the labelled training images contain which; see ``infer_groups``."""

    def infer() -> list[dict]:
        labeled, _ = split_records(cfg, train_records(cfg))
        return infer_groups(labeled, cfg.DATASETS.CLASSES, share)

    return once_per_machine(infer)


def main(args: argparse.Namespace) -> dict | None:
    """Train, or with ``--eval-only`` evaluate, in one process of the job."""
    trust_checkpoints(args.trust_checkpoint)  # a spawned process has not parsed the command line
    if args.eval_only:
        return evaluate(args)
    with plain_errors():
        with parsed_once():
            cfg = setup(args)
            trainer = trainer_class(cfg)(cfg)
        trainer.resume_or_load(resume=args.resume)
        comm.synchronize()  # all have read the weights, which may be among what is moved now
        new = Path(cfg.OUTPUT_DIR, NEW_CONFIG)
        if comm.is_main_process() and new.is_file():
            if not args.resume:
                set_aside(new.parent)
            new.replace(new.with_name("config.yaml"))
    return trainer.train()


def evaluate(args: argparse.Namespace) -> dict:
    """Score ``MODEL.WEIGHTS``, or with ``--resume`` the run's last checkpoint."""
    with plain_errors():
        with parsed_once():
            cfg = setup(args)
        trainer = trainer_class(cfg)
        model = trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.load_complete(
            checkpointer.get_checkpoint_file() if args.resume else cfg.MODEL.WEIGHTS
        )
    results = trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def invoke_main() -> None:
    """Parse the command line and start the processes of this machine."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # a free port: two runs of one user don't collide
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="as --resume, but start a new run where there is no checkpoint, and go on from the "
        "one before where the last is damaged: for jobs that are restarted by themselves",
    )
    add_trust_option(parser)
    args = parser.parse_args()
    args.resume |= args.resume_or_start
    with plain_errors():
        url = choose_url(args.num_gpus, args.num_machines, args.dist_url)
    several = args.num_gpus * args.num_machines > 1
    try:
        with relayed_signals() if several else nullcontext():
            launch(main, args.num_gpus, args.num_machines, args.machine_rank, url, (args,))
    except KeyboardInterrupt:  # within training it is no exception
        raise SystemExit("Stopped before the first step: there was nothing to save") from None


if __name__ == "__main__":
    invoke_main()
