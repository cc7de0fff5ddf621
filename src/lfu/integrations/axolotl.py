"""The axolotl plugin: `plugins: [lfu.integrations.axolotl.LfUPlugin]`.

`forgetting:` watches what the run forgets, with any trainer of axolotl; `lfu:` trains by Learning from the Undesirable.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lfu.forgetting.callback import ForgettingCallback
from lfu.integrations.any_trainer import check_settings, with_lfu
from lfu.support.errors import did_you_mean

# axolotl's fused LoRA kernels: they call no linear layer, so that an auxiliary on these layers would never be asked
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LfUArgs(BaseModel):
    """What the plugin adds to axolotl's YAML."""

    forgetting: dict[str, Any] | bool | None = None  # arguments of `ForgettingCallback`, or true for its defaults
    lfu: dict[str, Any] | bool | None = None  # settings of `LfUStep`, or true for its defaults with `lam: auto`

    @field_validator("forgetting")
    @classmethod
    def _callback_takes_it(cls, given: Any) -> Any:
        known = [name for name in inspect.signature(ForgettingCallback.__init__).parameters if name != "self"]
        for name in given if isinstance(given, Mapping) else ():
            if name not in known:
                raise ValueError(f"forgetting has no setting {name!r}: {', '.join(known)}.{did_you_mean(name, known)}")
        if given:
            ForgettingCallback(**settings_of(given))  # says what else is wrong, before the model is loaded
        return given

    @field_validator("lfu")
    @classmethod
    def _step_takes_it(cls, given: Any) -> Any:
        check_settings(settings_of(given))
        return given


class LfUPlugin(BasePlugin):
    """`ForgettingCallback` and the LfU trainer for axolotl."""

    def register(self, cfg: Any) -> None:
        """With `lfu:`, axolotl's fused LoRA kernels stay off, which it would switch on by itself.

        Raises ValueError: the YAML switches one on.
        """
        if not wanted(cfg.get("lfu")):
            return
        for kernel in KERNELS:
            if cfg.get(kernel):
                raise ValueError(f"{kernel}: true bypasses the layers that lfu: is attached to: set it to false")
            cfg[kernel] = False

    def get_input_args(self) -> str:
        """Where axolotl finds the settings that it should let through."""
        return "lfu.integrations.axolotl.LfUArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback, if `forgetting:` asks for it."""
        return [ForgettingCallback(**settings_of(cfg.forgetting))] if wanted(cfg.forgetting) else []

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """axolotl's trainer with LfU steps, if `lfu:` asks for it.

        Raises ValueError: a run that isn't supervised fine-tuning.
        """
        if not wanted(cfg.lfu):
            return None
        if cfg.rl or cfg.reward_model or cfg.process_reward_model:
            raise ValueError("lfu: works with supervised fine-tuning, and this run trains on preferences or rewards")
        from axolotl.core.trainers import AxolotlTrainer

        return with_lfu(AxolotlTrainer, **settings_of(cfg.lfu))


def wanted(given: Any) -> bool:
    """Whether a key asks for its part: `true`, or settings, none of them included (`lfu: {}`)."""
    return given is not None and given is not False


def settings_of(given: Any) -> dict[str, Any]:
    """The settings under a key, as a plain dictionary of such; empty for `true`."""
    items = given.items() if isinstance(given, Mapping) else ()
    return {name: settings_of(value) if isinstance(value, Mapping) else value for name, value in items}
