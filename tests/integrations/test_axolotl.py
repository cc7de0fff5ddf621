"""The axolotl plugin, with axolotl's base class as a stand-in; `make integrations` runs it in axolotl itself."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
from transformers import Trainer

from lfu import ForgettingCallback


class Settings(dict):
    """As axolotl's DictDefault: a key that isn't there is None."""

    __getattr__ = dict.get


@pytest.fixture
def axolotl(monkeypatch):
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.core", "axolotl.core.trainers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    sys.modules["axolotl.core.trainers"].AxolotlTrainer = Trainer
    monkeypatch.delitem(sys.modules, "lfu.integrations.axolotl", raising=False)
    yield importlib.import_module("lfu.integrations.axolotl")
    sys.modules.pop("lfu.integrations.axolotl", None)


@pytest.mark.parametrize(("forgetting", "lfu"), [(None, None), (False, False)])
def test_without_its_keys_it_does_nothing(axolotl, forgetting, lfu):
    plugin, cfg = axolotl.LfUPlugin(), Settings(forgetting=forgetting, lfu=lfu)
    plugin.register(cfg)
    assert plugin.add_callbacks_pre_trainer(cfg, None) == []
    assert plugin.get_trainer_cls(cfg) is None
    assert cfg.keys() == {"forgetting", "lfu"}


def test_the_keys_give_callback_and_trainer(axolotl):
    cfg = Settings(forgetting={"budget": {"prose": 0.05}, "stop": True}, lfu={"lam": 2.0})
    plugin = axolotl.LfUPlugin()
    plugin.register(cfg)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg, None)
    assert isinstance(callback, ForgettingCallback)
    assert callback.budget == {"prose": 0.05}
    trainer = plugin.get_trainer_cls(cfg)
    assert issubclass(trainer, Trainer)
    assert trainer.lfu_settings == {"lam": 2.0}
    assert [cfg[kernel] for kernel in axolotl.KERNELS] == [False, False, False]
    assert plugin.get_trainer_cls(Settings(lfu=True)).lfu_settings == {"lam": "auto"}


def test_what_lfu_cannot_train_is_refused(axolotl):
    with pytest.raises(ValueError, match="supervised"):
        axolotl.LfUPlugin().get_trainer_cls(Settings(lfu=True, rl="dpo"))
    with pytest.raises(ValueError, match="lora_mlp_kernel"):
        axolotl.LfUPlugin().register(Settings(lfu=True, lora_mlp_kernel=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lfu": {"alhpa": 1}}, "Did you mean alpha"),
        ({"forgetting": {"bugdet": 0.02}}, "Did you mean budget"),
        ({"forgetting": {"stop": True}}, "stop=True needs a budget"),
    ],
)
def test_a_mistake_in_the_yaml_is_told(axolotl, given, message):
    with pytest.raises(ValueError, match=message):
        axolotl.LfUArgs(**given)
    assert axolotl.LfUArgs(lfu=True, forgetting={"budget": 0.02}).lfu is True
