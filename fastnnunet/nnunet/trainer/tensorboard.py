"""What nnU-Net logs, as TensorBoard event files too."""

from pathlib import Path
from typing import Any


class TensorBoardLogger:
    """One of the loggers nnU-Net's MetaLogger hands every value to; writes `folder`/events.out.tfevents.*.

    `start` is the epoch training starts from: what an interrupted run logged from there on is overwritten.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start)

    def update_config(self, config: dict[str, Any]) -> None:
        """nnU-Net hands over plans and data set, which lie beside the checkpoints."""

    def log(self, key: str, value: Any, step: int) -> None:
        """One number of an epoch; times of day only say that the epoch is over."""
        if key.endswith("timestamps"):
            self._writer.flush()
        else:
            self._writer.add_scalar(key, float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        """One number of the whole training."""
        self._writer.add_scalar(key, float(value), 0)

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()
