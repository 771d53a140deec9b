"""Record one training step of PP 2 × EP 2 over a slow network and draw its two lanes: docs/images/overlap_trace.png.

    sudo .venv/bin/python -m benchmarks.overlap_trace

Real compute, four ranks on this machine's cores, each behind a link of 150 Mbit/s (`slow_network.py`; needs root). A
communication is drawn from its start to the moment when its result was taken; gloo does not say when it ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.overlap import run
from benchmarks.slow_network import NetworkError, SlowNetwork
from dualpipe.lanes_plot import save_lanes
from dualpipe.timeline import Span, Timeline

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "overlap_trace.png"
MEGABITS = 150.0


def main() -> None:
    try:
        with SlowNetwork(4, MEGABITS) as network:
            results = run(network, "trace", micro_batches=4)
    except NetworkError as error:
        sys.exit(str(error))
    spans = [Span(rank, *mark) for rank, result in enumerate(results) if rank in (0, 2) for mark in result["spans"]]
    name = f"A training step, PP 2 × EP 2, real compute, links of {MEGABITS:.0f} Mbit/s: both PP ranks of EP rank 0"
    ranks = {0: 0, 2: 1}
    shown = tuple(Span(ranks[s.rank], s.lane, s.label, s.start, s.end) for s in spans)
    save_lanes(Timeline(name, 2, shown), PICTURE, "seconds")
    print(PICTURE, json.dumps({"spans": len(shown)}))


if __name__ == "__main__":
    main()
