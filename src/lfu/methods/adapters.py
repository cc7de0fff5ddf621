"""What the methods share that start the LoRA adapter otherwise, or put another of PEFT's adapters in its place."""

from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from lfu.methods.method import Method
from lfu.methods.run import Preparation


class AdapterMethod(Method):
    """Refuses what is no plain LoRA, and asks `started` for the config in its place."""

    places = ("adapter",)
    whole_weights = True
    lacks: ClassVar[tuple[str, ...]] = (  # settings of LoRA that the method has no counterpart of
        "modules_to_save", "exclude_modules", "layers_to_transform", "target_parameters", "rank_pattern",
        "trainable_token_indices", "use_dora",
    )  # fmt: skip
    decomposes = False  # the weights, which must not be quantised

    def check_adapter(self, config: Any, *, further: bool = False) -> None:
        if further:
            raise self._error("starts an adapter, and the model is an adapter already: merge it first (lfu export)")
        if config is None:
            raise self._error("starts an adapter: train one (--use_peft true, or peft_config=LoraConfig(...))")
        if not isinstance(config, LoraConfig):
            raise self._error(f"starts from the settings of a LoRA adapter, got {type(config).__name__}")
        for field in self.lacks:
            if value := getattr(config, field, None):
                raise self._error(f"can't start an adapter with {field}={value!r}: drop it")

    def adapter(self, config: Any, run: Preparation) -> PeftConfig:
        if self.decomposes and getattr(run.model, "quantization_method", None) is not None:
            raise self._error("decomposes the weights, and those of this model are quantised: load it without")
        return self.started(config, run)

    def started(self, config: LoraConfig, run: Preparation) -> PeftConfig:
        """The PEFT config in place of `config`."""
        raise NotImplementedError

    def _error(self, what: str) -> ValueError:
        return ValueError(f"method {self.name!r} {what}")


def replaced(config: LoraConfig, kind: type[PeftConfig], run: Preparation, name: str, **options: Any) -> PeftConfig:
    """A config of another adapter for the same layers."""
    run.say(f"{name}: takes the place of the LoRA adapter, whose rank, alpha and dropout do not apply")
    return kind(target_modules=config.target_modules, task_type=config.task_type, **options)
