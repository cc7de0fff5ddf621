"""What an older TRL lacks: the stand-ins give what the newest TRL's own code gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from tiny_folder import byte_tokenizer
from trl.models.activation_offloading import OffloadActivations

from lfu.support import versions

NEWEST = pytest.mark.skipif(not hasattr(trl.trainer.utils, "_use_triton"), reason="needs a TRL newer than 1.15")


def case(bias: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    return hidden, weight, torch.randn(11, requires_grad=True) if bias else None, torch.randint(11, (7,))


@NEWEST
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("outputs", [(), versions.OUTPUTS, ("is_top1",)])
def test_the_plain_loss_is_trls_own(bias, softcap, outputs):
    kernel = trl.trainer.utils._ChunkedLogProbFunction
    found = []
    for function in (kernel, versions.AnyDevice):
        hidden, weight, offset, targets = case(bias)
        results = function.apply(hidden, weight, offset, targets, 0.7, 4, softcap, 0.9, outputs)
        (results[0] * torch.arange(7)).sum().backward()
        found.append((*results, hidden.grad, weight.grad, None if offset is None else offset.grad))
    torch.testing.assert_close(*found)


def test_where_there_is_no_gpu_the_kernel_is_not_asked(monkeypatch):
    monkeypatch.setattr(versions.AnyDevice, "kernel", None)
    old = SimpleNamespace(_ChunkedLogProbFunction=None)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", old)
    versions.mend_trl()
    versions.mend_trl()  # a second time it stays as it is
    assert old._ChunkedLogProbFunction is versions.AnyDevice
    assert versions.AnyDevice.kernel is None
    hidden, weight, _, targets = case(bias=False)
    log_p = old._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4)[0]
    expected = -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(log_p, expected)


@NEWEST
def test_the_newest_trl_is_left_alone():
    kernel, enter = trl.trainer.utils._ChunkedLogProbFunction, OffloadActivations.__enter__
    versions.mend_trl()
    assert trl.trainer.utils._ChunkedLogProbFunction is kernel
    assert OffloadActivations.__enter__ is enter


PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two and two?"}]
ANSWER = [{"role": "assistant", "content": "Four."}]


class OldTrainer:
    """As TRL 0.24 prepares a conversation: where the answer begins is told by the length of the prompt's ids."""

    def __init__(self, is_vlm=False):
        self._is_vlm, self.given = is_vlm, None

    def _prepare_dataset(self, dataset, processing_class, args, packing):
        self.given = processing_class
        prompt = processing_class.apply_chat_template(PROMPT, tokenize=True, add_generation_prompt=True)
        whole = processing_class.apply_chat_template(PROMPT + ANSWER)
        ids = whole["input_ids"] if isinstance(whole, Mapping) else whole
        return ids, [int(place >= len(prompt)) for place in range(len(ids))]


def test_trl_0_24_learns_the_answer_and_not_its_prompt(monkeypatch):
    mended = type("Mended", (OldTrainer,), {})
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    monkeypatch.setattr(trl, "SFTTrainer", mended)
    for _ in range(2):  # a second time it stays as it is
        versions.mend_trl()
        prepare = mended._prepare_dataset
    assert prepare.__wrapped__ is OldTrainer._prepare_dataset
    tokenizer = byte_tokenizer()
    learned = lambda ids, mask: tokenizer.decode([token for token, one in zip(ids, mask) if one])
    assert learned(*mended()._prepare_dataset([], tokenizer, None, True)) == "Four.<|im_end|>\n"
    assert "two and two" in learned(*OldTrainer()._prepare_dataset([], tokenizer, None, True))  # what is mended
    assert isinstance(tokenizer.apply_chat_template(PROMPT), Mapping)  # the user's tokenizer is as it was


def test_with_the_mend_a_dictionary_is_given_to_who_asks_and_a_processor_is_left_alone():
    tokenizer, asked = byte_tokenizer(), []

    def prepare(trainer, dataset, processing_class, args, packing):
        asked.append(processing_class)
        return processing_class.apply_chat_template(PROMPT, return_dict=True)

    trainer = OldTrainer()
    found = versions._with_ids(prepare)(trainer, [], tokenizer, None, False)
    assert found["input_ids"] == tokenizer.apply_chat_template(PROMPT, return_dict=False)
    assert asked[0].pad_token_id == tokenizer.pad_token_id
    versions._with_ids(prepare)(OldTrainer(is_vlm=True), [], tokenizer, None, False)
    assert asked[1] is tokenizer


def test_rows_that_lost_their_whole_answer_are_left_out_as_by_newer_trl():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[-100, -100], [-100, 4]]})
    made = versions._with_ids(lambda *given: rows)(OldTrainer(), [], byte_tokenizer(), None, False)
    assert list(made["input_ids"]) == [[3, 4]]


@pytest.mark.parametrize("liger", [False, True])
def test_labels_that_rows_bring_are_packed_with_them(liger):
    """TRL 0.24 drops them where it packs, and for the Liger kernel."""

    def prepare(trainer, dataset, processing_class, args, packing):
        return dataset.select_columns(["input_ids"]) if packing or args.use_liger_kernel else dataset

    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5]], "labels": [[-100, 2], [-100, -100], [5]]})
    args = SimpleNamespace(max_length=8, packing_strategy="bfd", use_liger_kernel=liger)
    made = versions._with_ids(prepare)(OldTrainer(), rows, byte_tokenizer(), args, True)
    assert [(row["input_ids"], row["labels"]) for row in made] == [([1, 2, 5], [-100, 2, 5])]
    assert (args.max_length, args.use_liger_kernel) == (8, liger)
    loose = versions._with_ids(prepare)(OldTrainer(), rows, byte_tokenizer(), args, False)
    assert list(loose["labels"]) == [[-100, 2], [5]]


def test_tools_that_are_json_text_are_read():
    def prepare(trainer, dataset, processing_class, args, packing):
        return processing_class.apply_chat_template(PROMPT, tools='[{"name": "f"}]', tokenize=False)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] }}"
    assert versions._with_ids(prepare)(OldTrainer(), [], tokenizer, None, False) == "f"
