"""`lfu train` on a tiny model: what it writes, resuming, interruption, and every wrong input it must catch."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lfu
from lfu.cli import main
from lfu.model.loading import load_model

FAST = (
    "--max_steps 4 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --gradient_checkpointing false "
    "--report_to none --disable_tqdm true"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a small training file."""
    monkeypatch.chdir(tmp_path)
    write_rows()
    return tmp_path


def write_rows():
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(model, *flags, output="out", data="rows.jsonl"):
    """`lfu train` with a few quick steps; a flag given twice takes its last value."""
    words = [word for flag in flags for word in flag.split()]
    return main(["train", "--model", model, "--data", data, "--output_dir", str(output), *FAST.split(), *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """The output folder of a run with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        write_rows()
        assert train(model, "--save_strategy steps --save_steps 2") == 0
    return folder / "out"


@pytest.fixture
def earlier(here, whole):
    """The same run's folder here, under its name."""
    shutil.copytree(whole, here / "out")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# -- what it does ----------------------------------------------------------------------------------------------------


def test_an_adapter_by_default(here, model, capsys):
    assert train(model) == 0
    out = capsys.readouterr().out
    assert "Trained on 8 rows" in out
    assert "4 steps" in out
    assert "lfu export out out-merged" in out
    settings = json.loads(Path("out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 16, 0.0)
    targets = {name.rpartition(".")[2] for name in settings["target_modules"]}
    assert targets == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    tuned, tokenizer = load_model("out")
    assert isinstance(tuned, PeftModel)
    assert tokenizer.chat_template


def test_all_weights(here, model, capsys):
    assert train(model, "--use_peft false") == 0
    assert "lfu export" not in capsys.readouterr().out
    before, after = load_model(model)[0].state_dict(), load_model("out")[0].state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_plain_sft_through_the_same_door(here, model):
    assert train(model, "--method sft --use_peft false") == 0
    assert Path("out/model.safetensors").is_file()


@pytest.mark.parametrize("flags", ["--lam auto", "--config reps", "--auxiliary own --layers early"])
def test_the_methods_variants(here, model, capsys, flags):
    assert train(model, flags, "--logging_steps 2") == 0
    assert "sft_loss" in capsys.readouterr().out


def test_a_row_has_the_number_of_the_file_though_rows_are_held_out(here, model, capsys):
    """They are drawn at random, so that the others are in another order."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(30)]
    rows[6] = {"question": "a", "answer": "b <|im_end|> c"}
    flags = f"train --model {model} --data rows.jsonl --dry_run true".split()
    write = lambda name, rows: Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("rows.jsonl", rows)
    assert main(flags) == 0
    assert "in 1 row (first: row 7)" in capsys.readouterr().err
    write("rows.jsonl", rows[:8])
    assert main([*flags, "--eval_data", "rows.jsonl", "--method", "sft"]) == 0
    assert {"in 1 row (first: row 7)", "in 1 evaluation row (first: row 7)"} <= {
        line[line.index("in 1") :] for line in capsys.readouterr().err.splitlines() if "in 1" in line
    }
    write("rows.jsonl", [*rows[:6], {"question": "a", "answer": ""}, *rows[8:]])
    assert main(flags) == 2
    assert "answer' (row 7)" in capsys.readouterr().err


def test_evaluation_data(here, model, capsys):
    assert train(model, "--eval_data word_problems:4 --eval_limit 2") == 0
    assert "eval_loss" in capsys.readouterr().out
    assert train(model, "--eval_split test --eval_limit 2", data="word_problems:4", output="out2") == 0


def test_a_recipe_and_flags(here, model):
    Path("my.yaml").write_text(f"model_name_or_path: {model}\ndata: rows.jsonl\noutput_dir: from-recipe\nlora_r: 2\n")
    assert main(["train", "--config", "my.yaml", *FAST.split(), "--output_dir", "from-flag"]) == 0
    assert json.loads(Path("from-flag/adapter_config.json").read_text())["r"] == 2
    assert not Path("from-recipe").exists()


def test_rows_that_will_be_cut_are_counted(here, model, capsys):
    assert train(model, "--max_length 40 --max_steps 1") == 0
    assert "rows are longer than max_length 40 and are cut there" in capsys.readouterr().err


def test_rows_that_lose_their_whole_answer_are_counted(here, model, capsys):
    rows = [{"question": "q" * (i * 40), "answer": "a"} for i in range(1, 5)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    flags = "--template none --max_length 100 --max_steps 1 --eval_data test.jsonl"
    assert train(model, flags, data="long.jsonl") == 0
    told = capsys.readouterr()
    assert "2 of 4 rows are longer than max_length 100" in told.err
    assert "2 of 3 evaluation rows are longer than max_length 100" in told.err
    assert "made for" not in told.err
    assert "2 of 4 rows are left out: max_length cuts off their whole answer" in told.err
    assert "Trained on 2 rows" in told.out


def test_rows_are_cut_where_the_models_positions_end(here, capsys):
    from tiny_folder import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    size = dict(
        n_embd=16, n_layer=2, n_head=2, n_positions=48, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    assert train("gpt2", "--max_steps 1 --template none") == 0
    err = capsys.readouterr().err
    assert "the model's context is 48 tokens: rows are cut there, not at max_length 2048" in err


def test_rows_that_are_there_twice_are_counted(here, model, capsys):
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("twice.jsonl").write_text("".join([*lines, lines[0], lines[1]]))
    Path("test.jsonl").write_text(lines[3] + '{"question": "new", "answer": "1"}\n')
    assert train(model, "--max_steps 1 --eval_data test.jsonl", data="twice.jsonl") == 0
    err = capsys.readouterr().err
    assert "2 of 10 rows are there before, word for word" in err
    assert "1 of 2 evaluation rows are among the training rows, too" in err


def test_out_of_memory_is_one_line_and_says_how_to_go_on(here, model, monkeypatch, capsys):
    original = lfu.LfUTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(lfu.LfUTrainer, "training_step", training_step)
    assert train(model, "--save_steps 2") == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lfu train: error")]
    assert "out of memory in step 4" in told
    assert "go on from out/checkpoint-2" in told


def test_a_bad_batch_is_one_line_where_it_should_stop_the_run(here, model, capsys):
    assert train(model, "--on_bad_batch raise --alpha 1e30 --template none --max_length 2048") == 2
    err = capsys.readouterr().err
    (told,) = [line for line in err.splitlines() if line.startswith("lfu train: error")]
    assert "step 1, micro-batch 0: non-finite" in told
    assert "--on_bad_batch skip" in told
    assert "no checkpoint was saved yet" in told
    assert "Traceback" not in err


def written(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_show_rows_prints_what_reaches_the_model_and_trains(here, model, capsys):
    written("two.jsonl", {"question": "4 + 4?", "answer": 8}, {"question": "7 / 2?", "answer": 3.5})
    assert train(model, "--max_steps 1 --show_rows 5", data="two.jsonl") == 0
    out = capsys.readouterr().out
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for number, (question, answer) in enumerate([("4 + 4?", "8"), ("7 / 2?", "3.5")], start=1):
        text = f"{prompt.format(question)}[[{answer}<|im_end|>\n]]\n"
        learned = len(answer) + 2
        tokens = len(prompt.format(question)) - len("<|im_start|><|im_end|><|im_start|>") + 3 + learned
        assert f"--- row {number}: {tokens} tokens, {learned} of them learned ---\n{text}" in out
    assert "Saved in out" in out


def test_a_chat_template_of_ones_own_is_that_of_every_shape(here, tmp_path, capsys):
    from tiny_folder import save_model

    base = save_model(tmp_path / "base", chat=False)
    Path("t.jinja").write_text(
        "{% for m in messages %}({{ m.role }}) {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}(assistant) {% endif %}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for data, row in {"m.jsonl": {"messages": messages}, "q.jsonl": {"question": "q", "answer": "a"}}.items():
        flags = "--max_steps 1 --show_rows 1 --chat_template_path t.jinja"
        assert train(base, flags, data=written(data, row), output=data[0]) == 0
        assert "(user) q<|im_end|>(assistant) [[a<|im_end|>]]" in capsys.readouterr().out
    assert train(base, "--chat_template_path nothing.jinja", data="q.jsonl") == 2
    assert "--chat_template_path nothing.jinja: no template file" in capsys.readouterr().err


def test_a_column_of_texts_by_another_name(here, model, capsys):
    flags = "--max_steps 1 --show_rows 1 --dataset_text_field body"
    assert train(model, flags, data=written("body.jsonl", {"body": "some text"})) == 0
    assert "[[some text<|im_end|>]]" in capsys.readouterr().out
    assert train(model, flags, data=written("text.jsonl", {"text": "some text"}), output="other") == 2
    assert "There is no column 'body' (--dataset_text_field)" in capsys.readouterr().err


def test_a_text_that_begins_with_bos_gets_no_second_one(here, model, capsys):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    shutil.copytree(model, "bos")
    tokenizer.save_pretrained("bos")
    rows = {"t.jsonl": {"text": f"{bos}hello"}, "p.jsonl": {"prompt": f"{bos}hel", "completion": "lo"}}
    for data, row in rows.items():
        assert train("bos", "--max_steps 1 --show_rows 1", data=written(data, row), output=data[0]) == 0
        told = capsys.readouterr()
        assert told.out.count(bos) == 1
        assert f"1 of 1 texts begin with {bos}" in told.err


def test_options_of_the_chat_template_in_some_rows_only(here, model):
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [talk | {"chat_template_kwargs": {"x": 1}}, talk, talk | {"chat_template_kwargs": None}]
    assert train(model, "--max_steps 1", data=written("some.jsonl", *rows)) == 0


def test_evaluation_rows_that_are_left_out_are_counted_and_none_left_is_refused(here, model, capsys):
    long = {"question": "q" * 200, "answer": "a"}
    flags = "--max_steps 1 --max_length 100 --template none --eval_data e.jsonl"
    written("e.jsonl", long, {"question": "q", "answer": "a"})
    assert train(model, flags) == 0
    assert "1 of 2 evaluation rows are left out: max_length cuts off their whole answer" in capsys.readouterr().err
    written("e.jsonl", long)
    assert train(model, flags, output="other") == 2
    assert "no row is left of the 1 evaluation rows" in capsys.readouterr().err


def test_where_the_loss_is_gets_one_line(here, model, capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    Path("chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    Path("text.jsonl").write_text(json.dumps({"text": "some text"}))
    told = {
        "rows.jsonl": "the answers only",
        "chat.jsonl": "every assistant turn (--assistant_only_loss",
    }
    for data, line in (told | {"text.jsonl": "all of each text"}).items():
        assert train(model, "--max_steps 1", data=data, output=data[:4]) == 0
        (rule,) = [line for line in capsys.readouterr().err.splitlines() if "the loss is on" in line]
        assert line in rule
    assert train(model, "--max_steps 1 --assistant_only_loss false", data="chat.jsonl") == 0
    assert "the loss is on every turn of the conversations" in capsys.readouterr().err


def test_an_adapter_can_be_trained_further(here, model, earlier, capsys):
    assert train("out", output="more") == 0
    assert "training the adapter out further" in capsys.readouterr().err
    first, second = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "more"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert train("out", "--lora_r 4", output="full") == 2
    assert "--lora_r is for a new adapter, and out is one, which is trained further" in capsys.readouterr().err
    assert train("out", "--use_peft false", output="full") == 2
    assert "merge it first" in capsys.readouterr().err


def test_resume_ends_where_the_whole_run_ends(here, model, whole, capsys):
    saving = "--save_strategy steps --save_steps 2"
    assert train(model, saving, f"--resume_from_checkpoint {whole}/checkpoint-2", output="resumed") == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, here / "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "checkpoint-2" not in capsys.readouterr().err
    more = f"--alpha 0.5 --data_limit 6 --resume_from_checkpoint {whole}/checkpoint-2"
    assert train(model, more, output="other") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "checkpoint-2" in line]
    assert "was trained with alpha auto, training rows 8 (hash " in line
    assert "goes on with alpha 0.5, training rows 6 (hash " in line


def test_resume_true_passes_over_a_checkpoint_that_a_killed_run_left_unfinished(here, model, earlier, capsys):
    unfinished = Path("out/checkpoint-6")
    unfinished.mkdir()
    (unfinished / "adapter_model.safetensors").write_bytes(b"half")
    assert train(model, "--save_steps 2 --max_steps 6 --resume_from_checkpoint true") == 0
    assert "steps 5 to 6" in capsys.readouterr().out
    assert Path("out/checkpoint-6/trainer_state.json").is_file()


def test_the_summary_says_what_a_resumed_run_did_and_when_there_was_nothing_to_do(here, model, earlier, capsys):
    limit = "--save_total_limit 1"  # the checkpoint that the run goes on from is gone in the end
    assert train(model, f"--save_steps 2 --max_steps 6 --resume_from_checkpoint true {limit}") == 0
    assert not Path("out/checkpoint-4").exists()
    assert "steps 5 to 6" in capsys.readouterr().out
    before = load_file("out/adapter_model.safetensors")
    Path("out/adapter_model.safetensors").unlink()  # as if killed between the last checkpoint and the save
    assert train(model, "--save_steps 2 --max_steps 6 --resume_from_checkpoint true") == 0
    assert "Nothing left to train: the run was complete at step 6" in capsys.readouterr().out
    after = load_file("out/adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("flags", "said"), [("--lam 1e-6", "hardly acts"), ("--lam 1e6", "dominates"), ("", None)])
def test_the_summary_judges_the_strength_of_a_short_run(here, model, capsys, flags, said):
    assert train(model, flags or "--lam auto --max_steps 8", "--logging_steps 1") == 0
    out = capsys.readouterr().out
    assert ("Note: at a gradient ratio" in out) == (said is not None)
    assert said is None or said in out


def test_overwriting_drops_the_earlier_run_only(here, model, earlier, capsys):
    Path("out/notes.txt").write_text("mine")
    capsys.readouterr()
    assert train(model) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert train(model, "--overwrite_output_dir --use_peft false --save_steps 3") == 0
    names = files("out")
    assert {"notes.txt", "model.safetensors", "checkpoint-3"} <= set(names)
    assert not {"adapter_model.safetensors", "adapter_config.json", "checkpoint-2"} & set(names)


def interrupt_at(monkeypatch, step):
    original = lfu.LfUTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(lfu.LfUTrainer, "training_step", training_step)


@pytest.mark.parametrize(("step", "hint"), [(3, "--resume_from_checkpoint true"), (1, "no checkpoint was saved yet")])
def test_ctrl_c_says_how_to_go_on(here, model, monkeypatch, capsys, step, hint):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert train(model, "--save_steps 2") == 130
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("lfu train: interrupted. Stopped after step")]
    assert len(told) == 1
    assert hint in told[0]
    assert "Traceback" not in err
    if step == 3:
        assert train(model, "--save_steps 2 --resume_from_checkpoint true") == 0


# -- what can be wrong -----------------------------------------------------------------------------------------------

CHEAP = {  # found before the model is loaded: flags, and what the one line says
    "missing file": ("--data rowz.jsonl", r"rowz.jsonl: no such file or folder. In . there is rows.jsonl"),
    "empty file": ("--data empty.jsonl", "empty.jsonl: empty"),
    "rows without an answer": ("--data blank.jsonl", "1 of 2 data rows have no answer in column 'answer' (row 2)"),
    "broken line": ("--data broken.jsonl", "broken.jsonl, line 2: not valid JSON"),
    "unknown columns": ("--data other.jsonl", "'questoin': Did you mean question"),
    "not on the hub": ("--data nobody/nothing", "data nobody/nothing: no file of that name here"),
    "unknown method": ("--method lfuu", "unknown method 'lfuu': use one of sft, lfu, lfu_reps"),
    "unknown auxiliary": ("--auxiliary loraa", "unknown auxiliary 'loraa'"),
    "alpha 0": ("--alpha 0", "alpha must be a finite number > 0 or 'auto', got 0.0"),
    "alpha below 0": ("--alpha -0.1", "alpha must be a finite number > 0 or 'auto', got -0.1"),
    "lam below 0": ("--lam -1", "lam must be a finite number >= 0"),
    "no number": ("--learning_rate fast", "invalid float value: 'fast'"),
    "unknown flag": ("--learning_rat 1", "unknown flag --learning_rat. Did you mean learning_rate"),
    "no flag": ("more.jsonl", "unexpected argument 'more.jsonl'"),
    "template": ("--template vicuna", "invalid choice: 'vicuna'"),
    "missing recipe": ("--config nothing.yaml", "recipe nothing.yaml: no such file"),
    "no model": ("--model nowhere/at/all", "model nowhere/at/all does not exist"),
    "no model on the hub": ("--model nobody/nothing", "model nobody/nothing can't be loaded"),
    "under a file": ("--output_dir rows.jsonl/out", "lies under rows.jsonl, which is a file"),
    "a file": ("--output_dir rows.jsonl", "output folder rows.jsonl is a file"),
    "not writable": ("--output_dir /proc/lfu-out", "can't be written"),
    "nothing to resume": ("--resume_from_checkpoint true", "nothing to resume"),
    "no checkpoint": ("--resume_from_checkpoint rows.jsonl", "not a checkpoint folder"),
    "no row is left": ("--max_length 8", "no row is left of the 8 rows: max_length 8 cuts off every answer"),
    "no row is left to pack": ("--packing --max_length 8", "no row is left of the 8 rows: max_length 8 cuts off"),
    "nothing to foretell": ("--data text.jsonl --max_length 1", "The first answer to be reached needs --max_length 2"),
    "no tracker": ("--report_to mlflow", "--report_to mlflow: MLflowCallback requires mlflow to be installed"),
    "two trackers in one word": ("--report_to wandb,mlflow", "--report_to wandb: WandbCallback requires wandb"),
    "no kernel": ("--use_liger_kernel true", "--use_liger_kernel needs the package liger_kernel"),
    "no optimizer": ("--optim galore_adamw", "--optim galore_adamw needs the package galore_torch"),
    "half a pair": ("--data pair.jsonl", "data row 2: column 'answer' holds half a surrogate pair"),
    "a picture": ("--data picture.jsonl", "data row 1: column 'messages', turn 1 has a part of type 'image_url'"),
    "nothing to evaluate": ("--eval_strategy epoch", "give --eval_data"),
    "rank of no adapter": (
        "--use_peft false --lora_r 4",
        "--lora_r is for an adapter, and --use_peft false trains all",
    ),
    "4 bit, of none": ("--bnb_4bit_quant_type fp4", "--bnb_4bit_quant_type is for weights of 4 bits"),
    "limit of nothing": ("--eval_limit 3", "--eval_limit is for evaluation rows that are given"),
    "split of a file": ("--data_split test", "rows.jsonl is a single file: drop it"),
    "configuration of a file": ("--data_config main", "--data_config is for data sets on the hub"),
    "measured, and not": ("--forgetting false --forgetting_every 2", "--forgetting false measures nothing"),
    "template of conversations": ("--data chat.jsonl --template alpaca", "--template alpaca is for questions"),
    "a rate below 0": ("--learning_rate -1", "learning_rate must be a finite number >= 0, got -1.0"),
    "no finite rate": ("--learning_rate inf", "learning_rate must be a finite number >= 0, got inf"),
    "no epoch": ("--num_train_epochs 0", "num_train_epochs must be a finite number > 0, got 0.0"),
    "epochs that are no number": ("--num_train_epochs nan", "num_train_epochs must be a finite number > 0"),
    "no step": ("--max_steps 0", "max_steps must be -1 or a whole number >= 1, got 0"),
    "an empty batch": ("--per_device_train_batch_size 0", "per_device_train_batch_size must be a whole number >= 1"),
    "nothing to accumulate": ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be a whole number"),
    "a seed below 0": ("--seed -1", "seed must be a whole number >= 0, got -1"),
    "beta": ("--adam_beta1 2", "adam_beta1 must be a number >= 0 and < 1, got 2.0"),
    "noise below 0": ("--neftune_noise_alpha -3", "neftune_noise_alpha must be a finite number >= 0"),
    "alpha of the adapter": ("--lora_alpha -3", "lora_alpha must be a whole number >= 1, got -3"),
    "no rows": ("--data_limit 0", "data_limit must be a whole number >= 1, got 0"),
    "columns of the evaluation rows": ("--eval_data other.jsonl", "--eval_data other.jsonl: the data has the columns"),
    "two strategies": ("--load_best_model_at_end true", "Evaluation strategy: no - Save strategy: steps"),
    "4 bit, all weights": ("--load_in_4bit --use_peft false", "quantised weights can't be trained"),
}


@pytest.mark.parametrize("case", CHEAP)
def test_cheap_checks_come_first_and_say_one_line(here, model, case, capsys, monkeypatch):
    flags, message = CHEAP[case]
    if flags.endswith("/proc/lfu-out") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer": " "}\n')
    Path("broken.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question"\n')
    Path("other.jsonl").write_text('{"questoin": "q", "answer": "a"}\n')
    written("text.jsonl", {"text": "abc"})
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    written("chat.jsonl", {"messages": talk})
    written("pair.jsonl", {"question": "q", "answer": "a"}, {"question": "q", "answer": "a\ud800"})
    part = {"type": "image_url", "image_url": {"url": "x"}}
    written("picture.jsonl", {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]})
    for tracker in ("wandb", "mlflow"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{tracker}_available", lambda: False)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    before = files(here)
    assert train(model, flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    assert err[0].startswith("lfu train: error: ")
    assert message.lower() in err[0].replace(f"{here}/", "").lower()
    assert files(here) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr_scheduler_kwargs {\"foo\":3}", "unexpected keyword argument 'foo'"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr or min_lr_rate should be set"),
        ("--optim adagrad --optim_args lr_decay=abc", "could not convert string to float: 'abc'"),
        ("--lora_modules_to_save lm_hed", "lora_modules_to_save lm_hed: the model has no module of that name"),
        (
            "--metric_for_best_model rouge --load_best_model_at_end true --eval_share 0.3 --eval_strategy epoch "
            "--save_strategy epoch", "set to 'eval_rouge', which is not found in the evaluation metrics"
        ),
    ],
)  # fmt: skip
def test_what_a_library_refuses_is_one_line(here, model, flags, message, capsys):
    assert train(model, flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert err[-1].startswith("lfu train: error: ")
    assert not Path("out/adapter_config.json").exists()


def test_no_model_and_no_data(here, model, capsys):
    assert main(["train", "--data", "rows.jsonl"]) == 2
    assert "no model: give --model_name_or_path" in capsys.readouterr().err
    assert main(["train", "--model", model]) == 2
    assert "no training data: give --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 2-9", "2-9"),
        ("--aux_targets nothing_proj", "nothing_proj"),
        ("--lora_target_modules nothing_proj", "nothing_proj"),
        ("--eos_token <nothing>", "<nothing>"),
        ("--save_strategy best --eval_data rows.jsonl", "metric_for_best_model"),
    ],
)
def test_what_does_not_fit_the_model_leaves_nothing(here, model, flags, message, capsys):
    assert train(model, flags, output="new/out") == 2
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("lfu train: error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in err
    assert files(here) == ["rows.jsonl"]


def test_saved_files_are_ordinary(here, earlier):
    assert AutoTokenizer.from_pretrained("out").eos_token == "<|im_end|>"
    assert not [name for name in files("out") if "aux" in name]
    weights = load_file("out/adapter_model.safetensors")
    assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
