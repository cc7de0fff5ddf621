"""From base models and draws of rows to what a setting's runs are made of, and to their scores."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from testbed.bases import runs_of
from testbed.gradients import mean_where, token_losses
from testbed.llama import Weights, hidden_states, is_linear, logits
from testbed.setting import Setting
from testbed.skills import OTHERS
from testbed.theta import norm
from testbed.tokens import PAD, Rows, numbers, old_rows, test_sets, tokens, training_rows
from testbed.tune import Material, Run, change, drawn_back, scores

WIDTH = 16  # of the longest row
TEXTS = 64  # rows of anchor text
OLD_ROWS = 512  # in the pool for replay; Fisher's matrix is taken on the first 64 of them
MOST_ROWS = 256

Result = dict[str, list[float]]


class Bed:
    """Every base model with every draw of rows: `bases * draws` runs, ordered base by base.

    Args:
        base: weights of the base models, `(bases, ...)`, on the device that computes.
        draws: runs a base; no two runs anywhere have the same draw of rows.
    """

    def __init__(self, base: Weights, draws: int):
        self.base, self.draws = base, draws
        some = next(iter(base.values()))
        self.device, self.count = some.device, len(some)
        self.which = torch.arange(self.count).repeat_interleave(draws)
        self.seeds = [1000 * b + d for b in range(self.count) for d in range(draws)]
        self.sets = {name: self._placed(tokens(rows)) for name, rows in test_sets().items()}
        made = [tokens(training_rows(MOST_ROWS, seed), WIDTH) for seed in self.seeds]
        self.rows = self._placed(Rows(np.stack([m.ids for m in made]), np.stack([m.answer for m in made])))

    def run(self, setting: Setting) -> Weights:
        """Fine-tunes every run; returns their weights, nothing drawn back yet."""
        torch.manual_seed(1)  # LoRA's A
        return Run(setting, self.material(setting)).train()

    def material(self, setting: Setting) -> Material:
        """What the runs of a setting need."""
        ids, answer = (t[:, : setting.rows] for t in self.rows)
        return Material(
            start=runs_of(self.base, self.which),
            ids=ids,
            answer=answer,
            order=self._order(setting),
            anchor=self._texts(setting.anchor_text) if setting.anchor else None,
            old=self._each(self._old) if setting.replay else None,
            fisher=runs_of(self._fisher, self.which) if setting.pull_kind == "fisher" else None,
        )

    def measured(self, setting: Setting, tuned: Weights) -> Result:
        """A list with an entry a run: shares in per cent, NLL in nats a token, and what `change` tells."""
        start = runs_of(self.base, self.which)
        weights = drawn_back(setting, start, tuned)
        found = {name: scores(weights, *rows) for name, rows in self.sets.items()}
        right = {name: 100 * hit.double().mean(1) for name, (_, hit) in found.items()}
        losses = {name: nll.mean(1) for name, (nll, _) in found.items()}
        ids, answer = (t[:, : setting.rows] for t in self.rows)
        learned, by_heart = scores(weights, ids, answer)
        values = {
            "target": right["target"],
            "reworded": right["reworded"],
            "others": torch.stack([right[name] for name in OTHERS]).mean(0),
            "nll_target": losses["target"],
            "nll_reworded": losses["reworded"],
            "nll_others": torch.stack([losses[name] for name in OTHERS]).mean(0),
            "nll_train": learned.mean(1),
            "train": 100 * by_heart.double().mean(1),
            **change(start, weights, is_linear),
            **{f"skill {name}": right[name] for name in OTHERS},
        }
        return {name: [float(f"{x:.4g}") for x in value.tolist()] for name, value in values.items()}

    def untouched(self) -> dict[str, list[float]]:
        """Set -> exactly right, per cent, of each base model."""
        return {
            name: [round(x, 2) for x in (100 * scores(self.base, *rows)[1].double().mean(1)).tolist()]
            for name, rows in self.sets.items()
        }

    # -- rows and their order ------------------------------------------------------------------------------------------

    def _placed(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(rows.ids).to(self.device), torch.from_numpy(rows.answer).to(self.device)

    def _order(self, setting: Setting) -> torch.Tensor:
        """`(steps, runs, B)`: all rows once, in a new order, again and again."""
        batch = min(setting.batch, setting.rows)
        made = []
        for seed in self.seeds:
            draw = np.random.default_rng(seed)
            epochs = -(-setting.steps * batch // setting.rows)
            every = np.concatenate([draw.permutation(setting.rows) for _ in range(epochs)])
            made.append(every[: setting.steps * batch].reshape(setting.steps, batch))
        return torch.from_numpy(np.stack(made, 1)).to(self.device)

    def _each(self, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        which = self.which.to(self.device)
        return pair[0][which], pair[1][which]

    # -- what some methods need ----------------------------------------------------------------------------------------

    @cached_property
    def _old(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the skills that are to be kept, others a base: `(bases, OLD_ROWS, T)` twice."""
        made = [tokens(old_rows(OLD_ROWS, seed), WIDTH) for seed in range(self.count)]
        return self._placed(Rows(np.stack([m.ids for m in made]), np.stack([m.answer for m in made])))

    def _texts(self, kind: str) -> torch.Tensor:
        """Anchor rows `(runs, TEXTS, T)`: written by the untouched model, random tokens, or old rows."""
        draw = torch.Generator(self.device).manual_seed(2)
        first, last = 2, len(numbers())  # neither padding nor the end
        drawn = lambda length: torch.randint(
            first, last, (self.count, TEXTS, length), generator=draw, device=self.device
        )
        if kind == "old":
            ids = self._old[0][:, :TEXTS]
        elif kind == "noise":
            ids = drawn(WIDTH)
        else:
            ids = self._written(drawn(1), draw)
        return ids[self.which.to(self.device)]

    @torch.no_grad()
    def _written(self, ids: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Continues each row by sampling from its base model up to the end token."""
        ended = torch.zeros_like(ids[:, :, 0], dtype=torch.bool)
        while ids.shape[-1] < WIDTH:
            p = logits(self.base, hidden_states(self.base, ids)[-1][:, :, -1:])[:, :, 0].softmax(-1)
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=draw).view(ended.shape)
            drawn = torch.where(ended, torch.full_like(drawn, PAD), drawn)
            ended = ended | (drawn <= 1)
            ids = torch.cat([ids, drawn[..., None]], -1)
        return ids

    @cached_property
    def _fisher(self) -> Weights:
        """Mean squared gradient of single old rows at the start, scaled to a mean of 1 a base: `(bases, ...)`."""
        total = {name: torch.zeros_like(w) for name, w in self.base.items()}
        for row in range(64):
            ids, answer = (t[:, row : row + 1] for t in self._old)
            leaves = {name: w.detach().requires_grad_() for name, w in self.base.items()}
            nll, _ = token_losses(leaves, hidden_states(leaves, ids)[-1], ids)
            loss = mean_where(nll, answer[:, :, 1:]).sum()
            for (name, _), g in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values()))):
                total[name] += g.square()
        numbers_ = sum(w[0].numel() for w in total.values())
        mean = norm([w.sqrt() for w in total.values()]).square() / numbers_
        return {name: w / mean.view(-1, *[1] * (w.dim() - 1)).clamp_min(1e-30) for name, w in total.items()}
