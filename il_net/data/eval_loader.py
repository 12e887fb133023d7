"""The images of an evaluation, one by one; those that cannot be read are left out and told."""

import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .mapper import TrainMapper
from .robust import MISSED, MappedImages, UnreadableImages
from .split import proposal_files
from .workers import watched

logger = logging.getLogger(__name__)


class EvalLoader:
    """Detectron2's loader of an evaluation, without the images that cannot be read.

    A metric that takes its images from the truth, as COCO's does, counts their objects as missed.

    Args:
        loader: this process' share, of samples of `MappedImages` with a limit of 0.
        unreadable: the account.
    """

    def __init__(self, loader: DataLoader, unreadable: UnreadableImages) -> None:
        self.loader = loader
        self.unreadable = unreadable

    def __len__(self) -> int:
        """Batches of this process, those of images that cannot be read among them."""
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """The batches; iterate to the end in every process.

        Raises:
            SystemExit: in every process, when all have read their share or have met too many
                themselves: more images than the limit, or none can be read. Or a worker has died.
        """
        read = 0
        for batch in watched(self.loader, "test"):
            if readable := self.unreadable.leave_out(batch):
                read += len(readable)
                yield readable
            elif len(self.unreadable.skipped) > self.unreadable.limit:
                break
        self._conclude(read)

    def _conclude(self, read: int) -> None:
        # A process that stopped alone would leave the others waiting for its predictions.
        accounts = comm.all_gather((self.unreadable.skipped, read))
        for skipped, _ in accounts:
            for name, reason in skipped.items():
                self.unreadable.enter(name, reason, MISSED)
        some_read = any(count for _, count in accounts)
        missed = len(self.unreadable.skipped)
        self.unreadable.check(none_read=bool(missed) and not some_read)
        if missed:
            logger.warning("%d images could not be read: the metrics count them as missed", missed)


def build_eval_loader(cfg: CfgNode, dataset_name: str) -> EvalLoader:
    """The loader of one of `DATASETS.TEST`.

    Images that cannot be read count against `DATALOADER.MAX_UNREADABLE`, in each evaluation anew.
    """
    records = get_detection_dataset_dicts(
        [dataset_name],
        filter_empty=False,
        proposal_files=proposal_files(cfg, "TEST", dataset_name),
    )
    images = MappedImages(records, TrainMapper(cfg, is_train=False), seed=0, limit=0)
    loader = build_detection_test_loader(
        images, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    return EvalLoader(loader, UnreadableImages.from_config(cfg))
