"""What a run shows of its experts' balance: numbers per layer after every step, loads and heat maps per window.

Names are balance/… for training and val_balance/… for validation; with a layer's name behind them they are of that
layer, without they are the worst layer's (entropy and nodes_per_token: the mean over layers; loss: the sum).

    max_vio            (largest load − mean) / mean within one global batch; in validation the mean over its batches
    max_vio_global     the same of all loads since the last evaluation, or of the whole validation text: what is left
                       when the accidents of single batches average out (arXiv 2408.15664, section 3)
    entropy            of the normalised scores of a token, mean over tokens, in nats; log(experts) is indifference
    bias_spread        largest − smallest router bias
    dead_experts       experts that no token chose since the last evaluation (in validation: at all)
    nodes_per_token    nodes (expert groups) that a token visits, mean
    bias_rate          γ of this step (without layers)
    loss               the balance losses, their coefficients included; no part of train/loss and val/loss

As tables, row by layer: load [experts], bias [experts], node_share [groups] (share of tokens that visit a node).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from model.balance import Counts, max_violation
from model.config import ModelConfig
from parallel.balance import RouterTable
from parallel.build import Replica
from training.config import BalanceConfig
from training.heatmap import HeatMap
from training.recipe import value_at

Loads = Mapping[str, list[int]]


def bias_rate(config: BalanceConfig, tokens: float) -> float:
    """γ of a step; `tokens` is how many were trained on before it."""
    factor = value_at(config.bias_rate_schedule, tokens) if config.bias_rate_schedule else 1.0
    return config.bias_rate * factor


class BalanceMonitor:
    """Gathers router counts on rank 0 and makes metrics of them.

    window    the counts since the last evaluation; they are part of a checkpoint, as recorded loads
    recorded  those of the checkpoint that the run goes on from
    """

    def __init__(self, replica: Replica, config: ModelConfig, eval_every: int, recorded: Loads) -> None:
        self._replica, self._eval_every = replica, eval_every
        self.table = RouterTable.create(replica.stages, replica.schedule, replica.mesh, config)
        width = Counts.width(config.num_experts, config.num_groups)
        rows = [recorded.get(name, [0] * width) for name in self.table.names]
        self.window = Counts(
            torch.tensor(rows, dtype=torch.int64).view(-1, width), self.table.experts, self.table.groups
        )
        self.biases_LE = torch.zeros(len(rows), self.table.experts, dtype=torch.float64)

    def after_step(self, step: int, counts: Counts | None) -> dict[str, float]:
        """Metrics of training step 1, 2, …; collective. The first step after an evaluation opens a new window."""
        if not self.table.names:
            return {}
        batch, self.biases_LE = self._gather(counts)
        self.window = batch if (step - 1) % self._eval_every == 0 else self.window + batch
        return summarise("balance", self.table.names, [batch], self.window, self.biases_LE)

    def after_validation(self, batches: Sequence[Counts | None]) -> tuple[dict[str, float], dict[str, HeatMap]]:
        """Metrics of one validation, and the tables of it and of the training window; collective."""
        if not self.table.names:
            return {}, {}
        gathered = [self._gather(counts)[0] for counts in batches]
        total = sum(gathered[1:], gathered[0])
        metrics = summarise("val_balance", self.table.names, gathered, total, self.biases_LE)
        tables = {**self._tables("balance", self.window), **self._tables("val_balance", total)}
        tables["balance/bias"] = HeatMap(self.table.names, self.biases_LE.tolist(), around_mean=False)
        return metrics, tables

    def recorded(self) -> dict[str, list[int]]:
        """The window, as plain numbers for a checkpoint; on rank 0."""
        return dict(zip(self.table.names, self.window.rows_LC.tolist(), strict=True))

    def _gather(self, counts: Counts | None) -> tuple[Counts, Tensor]:
        """On rank 0 those of the whole model."""
        return self.table.gather(counts, self._replica.stages, self._replica.mesh)

    def _tables(self, prefix: str, counts: Counts) -> dict[str, HeatMap]:
        share_LG = counts.visits_LG / counts.tokens_L.clamp(min=1).unsqueeze(1)
        return {
            f"{prefix}/load": HeatMap(self.table.names, counts.load_LE.tolist()),
            f"{prefix}/node_share": HeatMap(self.table.names, share_LG.tolist()),
        }


def summarise(
    prefix: str, names: Sequence[str], batches: Sequence[Counts], window: Counts, biases_LE: Tensor
) -> dict[str, float]:
    """The numbers described above, of one or several batches and of the window that they belong to.

    Layers that saw no tokens are left out: validation does without those of multi-token prediction.
    """
    total = Counts(torch.stack([batch.rows_LC for batch in batches]).sum(0), window.experts, window.groups)
    per_layer: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = [
        ("max_vio", torch.stack([max_violation(batch.load_LE) for batch in batches]).mean(0), torch.amax),
        ("max_vio_global", max_violation(window.load_LE), torch.amax),
        ("entropy", total.entropy_L / total.tokens_L.clamp(min=1), torch.mean),
        ("bias_spread", biases_LE.amax(-1) - biases_LE.amin(-1), torch.amax),
        ("dead_experts", (window.load_LE == 0).sum(-1).double(), torch.amax),
        ("nodes_per_token", window.visits_LG.sum(-1) / window.tokens_L.clamp(min=1), torch.mean),
        ("loss", total.loss_L / len(batches), torch.sum),
    ]
    metrics = {}
    used = [row for row, tokens in enumerate(window.tokens_L.tolist()) if tokens]
    for metric, values_L, of_all_layers in per_layer if used else ():
        metrics[f"{prefix}/{metric}"] = float(of_all_layers(values_L[used]))
        metrics.update({f"{prefix}/{metric}/{names[row]}": float(values_L[row]) for row in used})
    return metrics
