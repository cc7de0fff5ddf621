"""One way to get a model and its tokenizer: hub name, local folder, adapter folder, or the embedded default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lfu.model.embedded import EMBEDDED, embedded_folder, embedded_name
from lfu.support.errors import UserError, one_line

if TYPE_CHECKING:
    from lfu.support.annotations import Model, Tokenizer

T = TypeVar("T")

# What damaged files and broken configurations raise when they are loaded.
BROKEN = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    trainable: bool = False,
) -> tuple[Model, Tokenizer]:
    """Loads a causal language model and its tokenizer.

    Args:
        name: a hub name, a local folder (a full model or a PEFT adapter), or an embedded model: `smollm2`,
            `gemma3-270m`.
        dtype: `auto` (as stored) or a torch dtype's name.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that the model's repository brings along.
        attn_implementation: passed to transformers.
        quantization_config: passed to transformers.
        trainable: for an adapter folder, load the adapter so that it can be trained further.

    Returns:
        The model (a `PeftModel` for an adapter folder) and the tokenizer.

    Raises:
        UserError: if there is no such model, it can't be read, or the embedded default is not installed.
    """
    extra = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code} | {
        k: v for k, v in extra.items() if v is not None
    }
    if is_adapter(name):  # a local folder: the base is taken at its default revision
        model = _load_adapter(name, options, trainable)
    else:
        model = _load_full(name, options | {"revision": revision})
    return model, load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that `load_model` gives, without the model; errors as there."""
    if is_adapter(name):
        own = (Path(name).expanduser() / "tokenizer_config.json").is_file()
        name, revision = name if own else adapter_base(name), None
    load = partial(AutoTokenizer.from_pretrained, revision=revision, trust_remote_code=trust_remote_code)
    return _guarded(name, load)


def training_tokenizer(model: Any, args: Any) -> Tokenizer:
    """The tokenizer of TRL's `ModelConfig`, as `SFTTrainer` changes it by `args`' eos_token and chat_template_path.

    Raises UserError: as `load_model`, or a chat template that can't be read, or no such token.
    """
    name, trust = str(model.model_name_or_path), args.trust_remote_code
    tokenizer = load_tokenizer(name, revision=model.model_revision, trust_remote_code=trust)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {args.eos_token}: the model's tokenizer has no such token")
        tokenizer.eos_token = args.eos_token
    path = args.chat_template_path
    if path is None:
        return tokenizer
    if Path(path).is_file():
        if not path.endswith((".jinja", ".j2")):
            raise UserError(f"--chat_template_path {path}: a template's file must be called .jinja or .j2")
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--chat_template_path {path}: can't be read ({one_line(error)})") from error
        return tokenizer
    try:
        source = load_tokenizer(path)
        tokenizer.chat_template = source.get_chat_template()
    except (UserError, ValueError) as error:
        raise UserError(f"--chat_template_path {path}: no template file, nor a tokenizer with one ({error})") from error
    tokenizer.add_tokens([t for t in source.added_tokens_decoder.values() if t.content not in tokenizer.get_vocab()])
    tokenizer.eos_token = source.eos_token
    return tokenizer


def context_length(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[int | None, bool]:
    """The tokens that a model was made for, by its configuration, and whether it has no positions beyond them.

    A table of positions ends there. Rotary positions go on, and the model has not learned them. None where there is
    no such number. Errors as `load_model`.
    """
    if is_adapter(name):
        name, revision = adapter_base(name), None
    load = partial(AutoConfig.from_pretrained, revision=revision, trust_remote_code=trust_remote_code)
    config = _guarded(name, load, "config.json").get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not longest or getattr(config, "alibi", False):
        return None, False
    rotary = getattr(config, "rope_parameters", None)
    if not rotary:
        return int(longest), True
    factor, original = rotary.get("factor") or 1, rotary.get("original_max_position_embeddings") or longest
    return max(int(longest), int(factor * original)), False


def is_adapter(name: str | os.PathLike) -> bool:
    """Whether `name` is a local folder that holds a PEFT adapter."""
    return name not in EMBEDDED and (Path(name).expanduser() / "adapter_config.json").is_file()


def adapter_base(folder: str | os.PathLike) -> str:
    """The base model that an adapter folder names. Raises UserError: none, or no readable file."""
    path = Path(folder).expanduser() / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable adapter configuration ({one_line(error)})") from error
    if not base:
        raise UserError(f"{path}: names no base model: set base_model_name_or_path in it")
    # An adapter of the embedded model names a cache folder, which may be another machine's.
    return (None if Path(base).exists() else embedded_name(base)) or str(base)


def _load_full(name: str, options: dict[str, Any]) -> Model:
    def load(path: str) -> Model:
        if _is_path(name):
            _refuse_pickles(Path(path), "model", "pytorch_model")
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)

    return _guarded(name, load, "config.json")


def _load_adapter(name: str, options: dict[str, Any], trainable: bool) -> Model:
    from peft import PeftModel

    folder = Path(name).expanduser()
    _refuse_pickles(folder, "adapter_model")
    model = _load_full(adapter_base(name), options)
    try:
        _fit_the_embeddings(model, folder)
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except BROKEN as error:
        raise UserError(f"{name}: the adapter can't be loaded onto its base model: {one_line(error, 300)}") from error


def _fit_the_embeddings(model: Any, folder: Path) -> None:
    """Gives the base as many tokens as it had when the adapter was trained: those of the embeddings saved with it."""
    tables = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as saved:
        names = [*saved.keys()]
        whole = [name for name in names if name.endswith("weight") and "lora_" not in name]
        sizes = {saved.get_slice(name).get_shape()[0] for name in whole if tables & set(name.split("."))}
    if sizes and max(sizes) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)


def _refuse_pickles(folder: Path, *stems: str) -> None:
    """Raises UserError for a folder whose weights are pickles alone: loading those can run code."""
    names = [path.name for path in folder.iterdir() if path.name.startswith(stems)]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pkl", ".pt", ".pth", ".bin.index.json")))
    if pickles and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise UserError(
            f"model {folder} has its weights in {pickles[0]} alone, a pickle, which can run code and is not loaded: "
            "convert it to safetensors"
        )


def _guarded(name: str, load: Callable[[str], T], needs: str = "") -> T:
    """Calls `load` with the folder, which must hold the file `needs`, or hub name of `name`. Raises UserError."""
    local, path = _is_path(name), name
    if local:
        folder = Path(name).expanduser()
        path = str(folder)
        if not (folder / needs).exists() or not folder.is_dir():
            what = f"has no {needs}" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
            raise UserError(f"model {name} {what}: give a hub name, a model or adapter folder, or smollm2")
    elif name in EMBEDDED:
        path = str(embedded_folder(name))
    try:
        return load(path)
    except BROKEN as error:
        if str(error).startswith("Unrecognized configuration class"):  # transformers goes on to name all it knows
            raise UserError(
                f"model {name} is not a decoder-only language model: LfU can't train encoder-decoders (T5) or encoders"
            ) from error
        hint = " (smollm2 is the model that needs no network)" if path == name and not local else ""
        raise UserError(f"model {name} can't be loaded{hint}: {one_line(error, 300)}") from error


def _is_path(name: str) -> bool:
    """Whether `name` is meant as a local path: it exists, or it can't be a hub name."""
    if name in EMBEDDED:
        return False
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
