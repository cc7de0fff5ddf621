"""Base models: trained from scratch on all skills but the target, many at once, kept in files."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from testbed.gradients import mean_where, token_losses
from testbed.graphs import repeat
from testbed.llama import Shape, Weights, fresh, hidden_states
from testbed.tokens import lesson
from testbed.tune import Adam, clip

BATCH, RATE, DECAY = 64, 2e-3, 0.01
A_FILE = 6  # models in a file


class Lesson:
    """Training of all bases, an update at a time: AdamW, a cosine schedule to zero after a warm-up of 5 %."""

    def __init__(self, weights: Weights, lessons: torch.Tensor, steps: int):
        self.weights, self.lessons, self.steps = weights, lessons, steps
        self.tensors = list(weights.values())
        self.optimizer = Adam(self.tensors, 0.9, 0.98, DECAY)
        device = lessons.device
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.loss = torch.zeros(len(lessons), device=device)
        self.rows = torch.arange(BATCH, device=device)

    @property
    def state(self) -> list[torch.Tensor]:
        """Every tensor that an update changes."""
        return [self.step, self.loss, *self.tensors, *self.optimizer.state]

    def update(self) -> None:
        """One step of every base."""
        part = self.lessons.index_select(1, self.step * BATCH + self.rows).long()
        ids, prompt = part[:, :, 1:], part[:, :, :1]
        answer = (torch.arange(ids.shape[-1], device=ids.device) >= prompt) & (ids != 0)
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        weights = dict(zip(self.weights, leaves))
        nll, _ = token_losses(weights, hidden_states(weights, ids)[-1], ids)
        loss = mean_where(nll, answer[:, :, 1:])
        gradient = list(torch.autograd.grad(loss.sum(), leaves))
        with torch.no_grad():
            clip(gradient)
            done = self.step / self.steps
            rate = torch.minimum(self.step / max(1, self.steps // 20), 0.5 + 0.5 * torch.cos(math.pi * done))
            self.optimizer(self.tensors, gradient, RATE * rate)
            self.loss.copy_(loss.detach())
            self.step += 1


def lessons_of(seeds: Sequence[int], steps: int, jobs: int) -> torch.Tensor:
    """The rows that each base learns from, `(bases, steps * BATCH, 1 + T)` uint8, made by several processes."""
    jobs = min(jobs, len(seeds))
    if jobs < 2:
        return torch.from_numpy(np.stack([lesson(seed, steps * BATCH) for seed in seeds]))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        made = pool.starmap(lesson, [(seed, steps * BATCH) for seed in seeds])
    return torch.from_numpy(np.stack(made))


def bases(
    folder: Path, count: int, steps: int, shape: Shape, device: str, say: Callable[[str], None] = lambda line: None
) -> Weights:
    """Base models 0 to `count - 1`, `(count, ...)` float32: from the files in `folder`, or trained now and kept there.

    Weights are rounded to float16 once trained, so that files and a training that has just ended give the same.
    """
    groups = [list(range(first, min(first + A_FILE, count))) for first in range(0, count, A_FILE)]
    lacking = [seed for group in groups if not _file(folder, group, steps, shape).is_file() for seed in group]
    if lacking:
        say(f"training {len(lacking)} base models, {steps} steps each")
        trained = _trained(lacking, steps, shape, device, say)
        for group in groups:
            if group[0] in lacking:
                _keep(
                    folder, group, steps, shape, {n: w[[lacking.index(g) for g in group]] for n, w in trained.items()}
                )
    found = [torch.load(_file(folder, group, steps, shape), weights_only=True) for group in groups]
    return {name: torch.cat([part[name] for part in found]).to(device).float() for name in shape.weights()}


def _trained(seeds: list[int], steps: int, shape: Shape, device: str, say: Callable[[str], None]) -> Weights:
    lessons = lessons_of(seeds, steps, len(os.sched_getaffinity(0)))
    weights = {name: w.to(device) for name, w in fresh(shape, seeds).items()}
    training = Lesson(weights, lessons.to(device), steps)
    torch.backends.cuda.matmul.allow_tf32 = True  # what a base is matters, not how exactly it came about
    repeat(training.update, steps, training.state)
    torch.backends.cuda.matmul.allow_tf32 = False
    say("losses at the end of their training: " + " ".join(f"{x:.3f}" for x in training.loss.tolist()))
    return {name: w.half().cpu() for name, w in weights.items()}


def _file(folder: Path, group: list[int], steps: int, shape: Shape) -> Path:
    return folder / f"bases-{shape.width}x{shape.layers}-{steps}-{group[0]:02d}-{group[-1]:02d}.pt"


def _keep(folder: Path, group: list[int], steps: int, shape: Shape, weights: Weights) -> None:
    path = _file(folder, group, steps, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({name: w.clone() for name, w in weights.items()}, part)
    part.replace(path)


def runs_of(base: Weights, which: torch.Tensor) -> Weights:
    """The weights where each run starts: base `which[s]` for run s."""
    return {name: w.index_select(0, which.to(w.device)) for name, w in base.items()}
