"""One stage's moving parts: the wrapped networks, the optimiser and the average, one step of them, their state."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.methods.base import Part, Stage
from gengrad.registry import Settings
from gengrad.training.checkpoint import (
    load_module_state,
    load_optimizer_state_by_name,
    module_state,
    optimizer_state_by_name,
)
from gengrad.training.ema import EMA
from gengrad.training.schedule import learning_rate

if TYPE_CHECKING:
    from gengrad.training.loop import Progress, Run


MOST_ROWS = 2048  # sides of a weight above which SOAP leaves that side as it is: its eigenbasis would cost too much


class TrainSettings(Settings):
    """The ``train:`` section of a config. ``lr`` and ``warmup`` count optimiser steps, ``batch_size`` is global."""

    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(256, ge=2)
    accumulate: int = Field(1, ge=1)  # pieces that the batch goes through the network in: less memory, same gradient
    optimizer: Literal["adamw", "soap"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    lr_decay: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    ema_share: float = Field(0.02, ge=0, le=1)  # horizon of the weight average as a share of the stage; 0: none
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False  # torch.compile: minutes at the start, faster steps after; needs a C++ compiler
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=2)
    log_every: int = Field(50, ge=1)
    preview_every: int | None = Field(None, ge=1)  # steps between pictures; none: at the end only


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """``adamw``, or ``soap``: Adam in the eigenbases of the running means of G G' and G' G, G a weight's gradients

    (Vyas et al., arXiv 2409.11321, Algorithm 3), for losses whose curvature Adam's diagonal does not see. A step costs
    a few products of the weights' own sizes more; the first one looks at the gradient and moves nothing. Where G G' is
    of low rank its other eigenvectors are rounding, and steps along them as large as any: two runs whose sums are
    ordered differently part by several hundredths of the weights, where ``adamw`` keeps them within a millionth.
    """
    chosen = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **chosen, fused=True)
    from pytorch_optimizer import SOAP  # here, since it brings all of its hundred optimisers

    return SOAP(list(parameters), **chosen, max_precondition_dim=MOST_ROWS)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where, why and what was kept."""


class Fitter:
    """The moving parts of one stage: wrapped networks, optimiser, average; and their state by name."""

    def __init__(self, stage: Stage, settings: TrainSettings, run: Run):
        self.stage, self.settings, self.run = stage, settings, run
        device = run.accelerator.device
        for network in stage.networks.values():
            network.to(device)
        self.ema = EMA(stage.networks, settings.ema_share * stage.steps)
        stage.averages = self.ema.networks
        self.networks: dict[str, nn.Module] = {
            name: run.accelerator.prepare(network) for name, network in stage.networks.items()
        }
        if settings.compile:
            for network in self.networks.values():
                network.compile()
        self.spent: dict[str, float] = {}  # what the stage has logged as ..._seconds since the last line
        self.named = {f"{n}.{p}": w for n, net in stage.networks.items() for p, w in net.named_parameters()}
        self.optimizer = make_optimizer(self.named.values(), settings)

    def step(self, progress: Progress) -> tuple[Tensor, Tensor, dict[str, float]] | None:
        """One optimiser step; (loss, gradient norm, logs), or None when something was not finite and it was skipped."""
        run, settings, stage = self.run, self.settings, self.stage
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, stage.steps, settings.lr, settings.warmup, settings.lr_decay)
        self.optimizer.zero_grad(set_to_none=True)
        # `prepare` has wrapped the networks' forward for mixed precision; transport problems keep full precision
        try:
            loss, logs = self._gradient(progress.step)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"stage {stage.name!r}, step {progress.step}: out of GPU memory ({str(error).split('. ')[0]}). Lower "
                "train.batch_size or the network's width, or try train.precision=bf16 or train.accumulate=2; the last "
                "checkpoint is kept"
            ) from error
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise TrainingStopped(
                f"stage {stage.name!r}, step {progress.step}: torch.compile failed ({_beginning(error)}). Leave out "
                "train.compile; the last checkpoint is kept"
            ) from error
        norm = nn.utils.clip_grad_norm_(self.named.values(), settings.grad_clip)
        # the gradient is averaged over processes, so its norm tells all of them the same; the loss does not
        finite = torch.stack([loss.detach().float(), norm.float()]).isfinite().all()
        if run.accelerator.num_processes > 1:
            finite = run.accelerator.reduce(finite.float(), reduction="sum") == run.accelerator.num_processes
        if not finite:
            return None
        self.optimizer.step()
        self.ema.update(stage.networks, progress.step)
        return loss.detach(), norm.detach(), logs

    def _gradient(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and logs of the batch of ``step``, taken in pieces; its gradient is left in the weights."""
        accelerator, stage, settings = self.run.accelerator, self.stage, self.settings
        place = (settings.batch_size, accelerator.process_index, accelerator.num_processes)
        losses, logs = [], {}
        for piece in range(settings.accumulate):
            part = Part(step, *place, piece, settings.accumulate)
            with ExitStack() as stack:
                if piece < settings.accumulate - 1:  # processes meet once, at the last piece
                    for network in self.networks.values():
                        stack.enter_context(accelerator.no_sync(network))
                generator = generator_for(self.run.seed, f"train/{stage.name}", step)  # the same for all pieces
                loss, logs = stage.objective(self.networks, part, generator)
                accelerator.backward(loss / settings.accumulate)
            for key in logs:
                if key.endswith("_seconds"):
                    self.spend(key, logs[key])
            losses.append(loss.detach())
        return torch.stack(losses).mean(), logs

    def spend(self, name: str, seconds: float) -> None:
        """Adds to what the next line of the log says was spent since the last one."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def check_finite(self, run: Run) -> None:
        """Raises ``TrainingStopped`` where a weight is not finite: such a state is never committed."""
        for name, parameter in self.named.items():
            if not parameter.isfinite().all():
                raise TrainingStopped(
                    f"stage {self.stage.name!r}: the weights {name} are not finite after step {run.progress.step}; "
                    f"nothing of this step is saved. {run.way_out()}"
                )

    def state(self) -> dict:
        return {
            "networks": {name: module_state(network) for name, network in self.stage.networks.items()},
            "average": {name: module_state(network) for name, network in self.ema.networks.items()},
            "optimizer": optimizer_state_by_name(self.optimizer, self.named),
        }

    def load(self, state: dict) -> None:
        for name, network in self.stage.networks.items():
            load_module_state(network, state["networks"][name])
            load_module_state(self.ema.networks[name], state["average"][name])
        load_optimizer_state_by_name(self.optimizer, self.named, state["optimizer"])


def _beginning(error: Exception) -> str:
    """The first two lines of a compiler's message: who failed, and how."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
