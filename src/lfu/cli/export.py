"""Merge an adapter into its base model, and save the result as an ordinary transformers folder."""

from dataclasses import dataclass
from pathlib import Path

from lfu.cli import output
from lfu.cli.models import DTYPES
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.files import new_folder, os_errors_only
from lfu.support.flags import argument, option, read, switch
from lfu.support.quiet import quiet_libraries


@dataclass
class Export:
    """The flags of `lfu export`."""

    adapter: str = argument("ADAPTER_DIR", "folder with adapter_config.json")
    out: str = argument("OUT_DIR", "new folder for the full model")
    dtype: str = option("auto", "type of the saved weights; auto means the base model's", choices=DTYPES)
    trust_remote_code: bool = switch("", "run code that comes with the base model")


def run(argv: list[str]) -> int:
    """Merges and saves."""
    given = read(Export, "lfu export", __doc__, argv)
    adapter, out = Path(given.adapter), Path(given.out)
    _check(adapter, out)
    with output.no_empty_leftovers(out), quiet_libraries():
        merge(adapter, out, dtype=given.dtype, trust_remote_code=given.trust_remote_code)
    print(f"Merged {adapter} into {out}")
    return 0


def _check(adapter: Path, out: Path) -> None:
    from lfu.model.loading import is_adapter

    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such folder; give the output folder of lfu train")
    if not is_adapter(adapter):
        full = " (it is a full model already)" if (adapter / "config.json").is_file() else ""
        raise UserError(f"{adapter}: not an adapter, there is no adapter_config.json in it{full}")
    output.check_writable(out, "OUT_DIR")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty: choose a new folder")


def merge(adapter: Path, out: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Writes the merged model beside `out`, then renames it, so that `out` is complete or not there."""
    from lfu.model.loading import load_model

    model, tokenizer = load_model(str(adapter), dtype=dtype, trust_remote_code=trust_remote_code)
    with value_errors_are_the_users(f"{adapter}: can't be merged"):
        merged = model.merge_and_unload(safe_merge=True)
    with os_errors_only(out), new_folder(out.absolute()) as work:
        merged.save_pretrained(work)
        tokenizer.save_pretrained(work)
