"""Learning from the Undesirable as one method among the others. The algorithm is in lfu/step/step.py, not here."""

from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache, partial
from statistics import fmean
from typing import Any, ClassVar

import torch

from lfu.methods.method import Method
from lfu.methods.run import Micro, Trainer
from lfu.parallel.refusals import refuse_in_several, refuse_launch, refuse_zero
from lfu.parallel.several import Several, several
from lfu.parallel.zero import Zero
from lfu.step.cheaper import Sizes, cost, part_saves_nothing, settle_budget
from lfu.step.record import Record
from lfu.step.step import LfUStep
from lfu.training.advice import Advice


class LfU(Method):
    """`l = l_SFT(theta) + lam * mean ||stop(h) - h'||^2`, h' of the model pushed one ascent step wrong (Eq. 1 to 6).

    Its settings are fields of the config: alpha, lam, auxiliary, consistency, layers, ... With lam=0 it does nothing.
    """

    name = "lfu"
    summary = "Learning from the Undesirable: representations that an undesirable update cannot move"
    source = "Nam, Kim, Jeong, AAAI 2026, arXiv 2511.13052"
    protects = "general abilities, and steadiness under rewording (the paper's claims)"
    places = ("step",)
    takes_step = True
    fixed: ClassVar[tuple[str, str] | None] = None  # the setting that a variant stands for, and its value
    step: LfUStep | None = field(default=None, init=False, repr=False, compare=False)  # with lam=0 for good

    def configure(self, args: Any) -> None:
        if self.fixed is not None:
            name, value = self.fixed
            if (given := getattr(args, name)) not in (None, value):
                raise ValueError(f"method={self.name!r} means {name}={value!r}, got {name}={given!r}")
            setattr(args, name, value)

    def check(self, args: Any) -> None:
        if args.lam == 0:
            return
        refuse_settings(args)
        packed = args.packing or args.padding_free
        if args.part < 1 and (packed or args.per_device_train_batch_size == 1):
            why = "a packed micro-batch is one row" if packed else "per_device_train_batch_size=1"
            raise ValueError(f"part={args.part:g} takes some rows of a micro-batch, and {why}: use every=k")

    def setup(self, trainer: Trainer) -> None:
        args = trainer.args
        if args.lam == 0:
            return
        refuse_launch(trainer)
        _refuse_setup(trainer)
        self.step = trainer.step = step = make_step(trainer)
        self.keeps_gradients_sound = True
        needs = step.ascends_theta, step.term.reads_logits, step.settings.stale
        if trainer.is_deepspeed_enabled:
            refuse_zero(trainer, *needs, fused_experts=bool(getattr(step.auxiliary, "experts", None)))
        elif several(trainer):
            refuse_in_several(*needs, by="FSDP" if trainer.is_fsdp_enabled else "")
        _tell_approximate(trainer, step)
        self.advice = Advice(args.lam)
        self._update_losses: list[float] = []

    def training_step(self, trainer: Trainer, micro: Micro) -> torch.Tensor:
        """One micro-batch; returns its part of Eq. 6 (detached), scaled as SFTTrainer scales its loss."""
        step = trainer.step
        if step is None:
            return micro.run()
        if several(trainer) and getattr(step.processes, "wrapper", None) is not micro.model:
            kind = Zero if trainer.is_deepspeed_enabled else Several
            step.processes = kind(micro.model, trainer.args.ascent_scope, trainer.accelerator)  # now there is a wrapper
        independent = trainer.args.ascent_batch == "independent"
        record = step(
            micro.inputs,
            ascent_batch=self._independent_batch(trainer, micro.index) if independent else None,
            num_items=micro.items,
            first_pass=lambda: trainer.guarded(micro.run, step.processes),
            index=micro.index,
            update=trainer.state.global_step,
        )
        trainer.last_record = record
        found = trainer.figures_of(record, micro.items, step.processes.size, trainer.args.log_layers)
        for name, value in found.items():
            trainer.log_metric(f"lfu/{name}", value)
        if trainer.args.advice and trainer.is_world_process_zero():
            self._advise(record, trainer.starts_update)
        return trainer.share_of_loss(record, micro.items, step.processes.size)

    def _independent_batch(self, trainer: Trainer, index: int) -> dict[str, Any]:
        """Micro-batch `index` of an own shuffle of the training set, by number: nothing to save for a resume.

        Several processes take turns, as in the data loader: together they have one micro-batch of the whole size.
        """
        dataset, wanted = trainer.train_dataset, trainer._train_batch_size
        index = index * trainer.accelerator.num_processes + trainer.accelerator.process_index
        rows = []
        for position in range(index * wanted, (index + 1) * wanted):
            epoch, place = divmod(position, len(dataset))
            rows.append(dataset[int(_shuffled(len(dataset), trainer.args.seed, epoch)[place])])
        return trainer.batch_of(rows)

    def _advise(self, record: Record, starts_update: bool) -> None:
        if record.form == "exact":
            self.advice.watch(record)
        if starts_update and self._update_losses:
            self.advice.watch_loss(fmean(self._update_losses))
            self._update_losses = []
        if record.skipped is None:
            self._update_losses.append(record.sft_loss)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self.step is None else self.step.state_dict()

    @property
    def misses_its_state(self) -> bool:
        return self.step is not None and self.step.strength is not None

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if self.step is not None:
            self.step.load_state_dict(state)


class LfURepS(LfU):
    """LfU whose ascent moves one vector per layer, `h'[l] = h[l] + d_l` (paper: alpha and lam 0.1, `preset="reps"`)."""

    name = "lfu_reps"
    summary = "LfU with one steering vector per layer as the auxiliary"
    fixed = ("auxiliary", "steering")


class LogitKL(LfU):
    """LfU with `KL(softmax(stop z) || softmax z')` in place of the distance of the representations (Eq. 7)."""

    name = "logit_kl"
    summary = "LfU with the consistency on next-token distributions instead of representations"
    source = "a baseline of the LfU paper, arXiv 2511.13052, Eq. 7 and Table 6e"
    fixed = ("consistency", "logit_kl")


@lru_cache(maxsize=1)
def _shuffled(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))


def make_step(trainer: Trainer) -> LfUStep:
    """The step that the config asks for, with the trainer's loss, precision and backward."""
    args, accelerator = trainer.args, trainer.accelerator
    # DeepSpeed would divide by the accumulation steps, which `items` has done already
    undivided = {"scale_wrt_gas": False} if trainer.is_deepspeed_enabled else {}
    return LfUStep(
        trainer.model,
        args.step,
        auxiliary=trainer.make_auxiliary(),
        consistency=args.make("consistency"),
        loss_fn=trainer.extra_loss,
        backward=partial(accelerator.backward, **undivided),
        autocast=accelerator.autocast,
        second_pass=lambda: trainer.maybe_activation_offload_context,
        grad_scaler=accelerator.scaler,
    )


def _tell_approximate(trainer: Trainer, step: LfUStep) -> None:
    """Settles `budget`, and says which approximate form the run uses and what it costs."""
    args, budget, picked = trainer.args, step.budget, ""
    rows = 1 if args.packing or args.padding_free else args.per_device_train_batch_size
    if budget is not None:
        settle_budget(step, rows, noise=bool(args.neftune_noise_alpha), alone=not several(trainer))
        picked = f"budget={budget:g} picks "
    if picked or not step.cheaper.exact:
        form = f"{step.cheaper} (approximate)" if not step.cheaper.exact else "the exact step"
        trainer.say(f"{picked}{form}: about {cost(step.cheaper, Sizes.of(step, rows)):.2f} times an SFT step, counted")


def refuse_settings(args: Any) -> None:
    """Settings of SFTConfig that cannot work with LfU; each with the reason and the way out.

    Raises ValueError: reentrant checkpointing, optimizers that update in the backward, torch.compile.
    """
    kwargs = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None) or {}
    optim = str(getattr(args.optim, "value", args.optim))
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} hides the auxiliary from autograd, so the ascent "
            "would have no gradient: leave use_reentrant at False"
        )
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"optim={optim!r} updates weights during the backward pass, and LfU needs two backward passes at "
            "the same weights: use another optimizer, such as adamw_torch"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True: LfU attaches and removes hooks in every step, which would compile the model anew each "
            "time; leave it off"
        )


def _refuse_setup(trainer: Trainer) -> None:
    """What shows only once TRL has set model and data up."""
    args, peft_config = trainer.args, getattr(trainer.model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens before the prompt, so token positions do not match "
            "the labels': use LoRA, DoRA or full fine-tuning with LfU"
        )
    if trainer.accelerator.mixed_precision == "fp8":
        raise ValueError("mixed precision fp8 replaces the layers that LfU is attached to: use bf16")
    if args.part < 1 and args.same_dropout and args.neftune_noise_alpha:
        raise ValueError(part_saves_nothing(args.part))
    if getattr(trainer, "_is_vision_dataset", False):
        raise ValueError("LfU compares text layers: vision-language data sets are not supported")
    if args.ascent_batch == "independent" and not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("ascent_batch='independent' draws rows by number: a streamed data set has none")
