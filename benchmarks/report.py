"""What every benchmark does with its figures: print a table, and write benchmarks/results/NAME.json."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured case: our figure, the peer's or limit's, and ours ÷ theirs."""

    case: str
    metric: str
    ours: float
    peer: str
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def machine() -> dict[str, object]:
    """Where this was measured."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "cpu_model": _model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(psutil.getloadavg()[0], 2),
    }


def publish(name: str, rows: list[Row], keep: bool = False) -> None:
    """Print the rows as a table and write them beside the machine's description.

    keep   leave other cases in the file as they are: for what is measured in pieces, on one machine
    """
    cells = [("case", "metric", "ours", "peer", "theirs", "ratio")]
    cells += [(r.case, r.metric, f"{r.ours:.4g}", r.peer, f"{r.theirs:.4g}", f"{r.ratio:.3f}") for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    RESULTS.mkdir(exist_ok=True)
    path, cases = RESULTS / f"{name}.json", {r.case for r in rows}
    before = json.loads(path.read_text())["rows"] if keep and path.exists() else []
    found = [row for row in before if row["case"] not in cases] + [{**asdict(r), "ratio": r.ratio} for r in rows]
    path.write_text(json.dumps({"rows": found, "machine": machine()}, indent=1) + "\n")


def _model() -> str:
    """Family and model of the processor: virtual machines may call several generations by the same name."""
    found = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith(("cpu family", "model\t"))][:2]
    return "family {}, model {}".format(*found) if len(found) == 2 else "unknown"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
