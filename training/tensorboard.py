"""TensorBoard: event files in `run_dir/tensorboard`. Needs the package tensorboard (the extra of the same name)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from training.heatmap import HeatMap
from training.loggers import Metrics, printable

PACKAGE = "tensorboard"


def check_tensorboard() -> None:
    """Raise ValueError, with the command that mends it, unless the package is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(
            "logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'; or choose another one"
        )


class TensorBoardLogger:
    """What is logged for a step twice, after a resumption, is hidden from `resume_step` on, as TensorBoard does it."""

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._open(resume_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, because few runs use it

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def text(self, step: int, name: str, text: str) -> None:
        indented = "".join(f"    {line}\n" for line in printable(text).splitlines())  # Markdown: shown as it is
        self._writer.add_text(name, indented, step)

    def image(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(str(path))[..., :3], step, dataformats="HWC")

    def table(self, step: int, name: str, table: HeatMap) -> None:
        self._writer.add_image(name, table.image(), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()
