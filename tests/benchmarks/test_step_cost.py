"""The benchmark's own functions: counting, pairing, fits, parsing; and one whole run on the smallest shapes."""

from __future__ import annotations

import json
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import step_cost
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepcost.cases import Case, make_batch, make_model, needed_lengths
from stepcost.causes import CAUSES
from stepcost.clock import Deadline, interleave, paired, paired_ratios, quartiles
from stepcost.curves import cases_of, curve, parse_curve
from stepcost.fits import exponent, per_doubling
from stepcost.flops import count, floors
from stepcost.profiling import ELEMENTWISE, group_of, profiled
from stepcost.variants import DRAWS, SAMPLES, lfu_step, make_step, parse_variant, twin_of, typical_start

from lfu import LfUStep
from lfu.step.cheaper import draw_layers, generator

TINY = Case("full", "tiny", batch=2, length=12)


# -- arithmetic ------------------------------------------------------------------------------------


def test_a_matrix_product_counts_two_a_multiplication_and_twice_that_backward():
    x, w = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    assert count(lambda: x @ w) == 2 * 5 * 7 * 3
    assert count(lambda: (x @ w).sum().backward()) == 2 * (2 * 5 * 7 * 3)


def test_the_floor_by_hand():
    found = floors(TINY)
    d, inner, layers, heads, kv, vocab, tokens, rows = 32, 64, 3, 4, 2, 320, 12, 2
    linear = layers * (2 * d * d + 2 * d * (d // heads * kv) + 3 * d * inner)
    attention = layers * rows * 2 * 2 * heads * tokens**2 * (d // heads)
    decoder = 2 * rows * tokens * linear + attention
    assert found["second_pass"]["forward"] == decoder
    assert found["sft"]["forward"] == decoder + 2 * rows * tokens * d * vocab
    assert found["parameters"] == linear + vocab * d + (2 * layers + 1) * d
    assert 1 < found["floor_unpadded"] < found["floor_padded"] < 2
    assert found["unpadded_share"] == pytest.approx((11 + 7) / 24)


@pytest.mark.parametrize("theta", ["lora", "full"])
def test_what_a_real_step_counts_is_the_floor_and_a_little(theta):
    case = TINY.along("theta", theta)
    model, batch = make_model(case), make_batch(2, 12, 320)
    sft = count(make_step(parse_variant("sft"), model, batch))
    assert sft == sum(floors(case)["sft"].values())
    decoder = count(make_step(parse_variant("decoder"), model, batch))
    padded = count(make_step(parse_variant("steering:trim=false"), model, batch))
    assert sft + decoder <= padded < 1.02 * (sft + decoder)
    assert count(make_step(parse_variant("steering"), model, batch)) < padded


def test_needed_lengths_end_where_the_last_label_is_predicted():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, -100, -100], [-100] * 5])
    assert needed_lengths(labels) == [3, 1, 0]


def test_the_unpadded_pass_sees_what_the_padded_one_sees():
    model, batch = twin_of(make_model(TINY)), make_batch(2, 12, 320)
    lengths = needed_lengths(batch["labels"])
    padded = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    packed = model.model(
        input_ids=torch.cat([ids[:n] for ids, n in zip(batch["input_ids"], lengths)])[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat([h[:n] for h, n in zip(padded, lengths)]), rtol=1e-4, atol=1e-5)


# -- time ------------------------------------------------------------------------------------------


def test_ratios_are_medians_of_pairs_not_ratios_of_medians():
    taken = {"sft": [1.0, 10.0, 100.0], "lora": [2.0, 30.0, 150.0]}
    assert paired_ratios(taken, "sft") == {"sft": 1.0, "lora": 2.0}
    assert paired_ratios(taken, "sft", "lora")["lora"] == pytest.approx(2 / 3)  # 2 / 3, 30 / 40, 150 / 250
    assert quartiles(paired(taken, "sft")["lora"]) == (1.75, 2.5)
    assert quartiles([2.0]) == (2.0, 2.0)


def test_the_first_round_warms_up_and_a_cut_round_is_dropped():
    calls = []
    sample = lambda name: lambda: calls.append(name) or float(len(calls))
    taken = interleave({"a": sample("a"), "b": sample("b")}, 2, Deadline(None), lambda text: None)
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert interleave({"a": sample("a")}, 2, Deadline(0), lambda text: None) == {"a": []}


# -- fits ------------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_a_power_law_is_found_again(p, c):
    xs = [1.0, 2.0, 8.0, 50.0]
    assert exponent(xs, [c * x**p for x in xs]) == pytest.approx(p, abs=1e-6)
    assert per_doubling(xs, [c + p * math.log2(x) for x in xs]) == pytest.approx(p, abs=1e-6)


def test_fits_of_one_point_and_of_what_has_no_logarithm():
    assert math.isnan(exponent([2.0], [3.0]))
    assert math.isnan(per_doubling([2.0, 2.0], [3.0, 4.0]))
    with pytest.raises(ValueError, match="> 0"):
        exponent([1.0, 2.0], [0.0, 1.0])


# -- what is typed ---------------------------------------------------------------------------------


def test_variants_are_keywords_of_the_step_or_of_its_auxiliary():
    found = parse_variant("lora:alpha=0.05,layers=early,rank=4,final_norm=false")
    assert found.options == {"alpha": 0.05, "layers": "early", "rank": 4, "final_norm": False}
    model, batch = make_model(TINY), make_batch(2, 12, 320)
    assert make_step(found, model, batch)().skipped is None


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("lora", ["exact"]),
        ("lora:every=2", ["exact", "not due"]),
        ("lfu:every=2", ["exact", "not due"]),  # through the trainer, each micro-batch an update
        ("lora:stale=2", ["exact", "first-order"]),
        ("lora:budget=1.3", ["exact", *["not due"] * 3]),  # of 2 rows and 3 layers no other form is so cheap
        ("lora:part=0.5", ["exact"] * DRAWS),
        ("lora:random_layers=1", ["exact"] * DRAWS),
    ],
)
def test_a_sample_is_a_whole_cycle_of_an_approximate_form_each_time_the_same(text, forms, monkeypatch):
    records, call = [], LfUStep.__call__

    def noted(self, *positional, **named):
        records.append(call(self, *positional, **named))
        return records[-1]

    monkeypatch.setattr(LfUStep, "__call__", noted)
    found = make_step(parse_variant(text), make_model(TINY), make_batch(2, 12, 320))
    found.sample()
    first, records[:] = list(records), []
    found.sample()
    assert [record.form for record in records] == forms
    assert [list(r.consistency_per_layer) for r in records] == [list(r.consistency_per_layer) for r in first]


def test_the_sample_of_a_drawing_form_costs_what_it_does_on_average():
    model, batch = make_model(TINY.along("layers", 12)), make_batch(2, 12, 320)
    step = lfu_step(parse_variant("steering:random_layers=3,trim=false"), model, 2)
    depths = [
        draw_layers(step.reader.layers, 3, generator(step.settings.seed, index))[-1] for index in range(SAMPLES * DRAWS)
    ]
    start = typical_start(step, batch, DRAWS)
    assert fmean(depths[start : start + DRAWS]) == pytest.approx(fmean(depths), abs=0.25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lroa", "unknown variant 'lroa'.*Did you mean lora"),
        ("lora:alhpa=1", "no option 'alhpa'.*Did you mean alpha"),
        ("lora:alpha", "not of the form option=value"),
        ("sft:alpha=1", "sft takes no options"),
    ],
)
def test_wrong_variants(text, said):
    with pytest.raises(ValueError, match=said):
        parse_variant(text)


@pytest.mark.parametrize("text", ["lenght=1", "length=", "length=x", "batch=0", "size=9b", "size=30m@size=70m"])
def test_wrong_curves(text):
    with pytest.raises(ValueError, match=r"axis|one value|values|whole numbers|no such"):
        parse_curve(text)


def test_cases_along_curves_are_measured_once():
    found = cases_of([TINY], [parse_curve("length=12,24"), parse_curve("size=tiny,30m")])
    assert found == [TINY, TINY.along("length", 24), TINY.along("size", "30m")]
    assert cases_of([TINY], [parse_curve("rank=2,32")]) == [TINY]  # all weights have no rank
    assert cases_of([TINY], [parse_curve("size=30m@batch=1")])[1:] == [TINY.along("size", "30m").along("batch", 1)]


def jobs(*words):
    parser = step_cost.make_parser()
    return step_cost.jobs_of(step_cost.settings_of(parser.parse_args(words), parser))


def test_presets_measure_memory_and_the_further_cases_where_they_say():
    (*_, (case, plan)) = jobs("--preset", "main")
    assert (case.theta, case.length, plan.memory) == ("lora", 512, True)
    assert len(jobs("--preset", "main", "--length", "64")) == 2  # one a theta: another case has no further ones
    remembered = [case for case, plan in jobs("--preset", "curves") if plan.memory]
    assert {(c.batch, c.size) for c in remembered} == {(4, "30m")}
    assert sorted(c.length for c in remembered if c.theta == "full") == [64, 128, 256, 512]
    assert {c.size for c, _ in jobs("--preset", "curves") if c.batch == 1} == {"30m", "70m", "135m", "360m", "500m"}
    assert all(plan.variants for _, plan in jobs("--preset", "cheaper"))


class FakeProfile:
    """What torch.profiler shows of one product on a GPU: the operation, its kernel, the launch."""

    def __init__(self, **options):
        kinds = (("aten::mm", 2_000_000), ("ampere_sgemm_128x64_tn", 2_000_000), ("cudaLaunchKernel", 0))
        self.events = [SimpleNamespace(key=key, self_device_time_total=time) for key, time in kinds]

    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None
    key_averages = lambda self: self.events


def test_a_kernel_on_a_gpu_is_counted_once(monkeypatch):
    monkeypatch.setattr("stepcost.profiling.profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = profiled(lambda: None, "cuda")
    assert {group: spent for group, spent in found.items() if spent} == {"matrix products": 2.0}


@pytest.mark.parametrize(
    ("name", "group"),
    [("aten::mm", "matrix products"), ("aten::mul", ELEMENTWISE), ("aten::t", "views and allocation"),
     ("aten::to", "copies and gathers"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
     ("aten::_log_softmax", "loss (softmax, nll)"), ("aten::tanh", ELEMENTWISE), ("aten::topk", ELEMENTWISE)],
)  # fmt: skip
def test_groups_of_operations(name, group):
    assert group_of(name) == group


# -- a whole run -----------------------------------------------------------------------------------


def run(*words):
    smallest = "--size tiny --layers 2 --batch 2 --length 12 --rounds 1 --theta lora"
    step_cost.main([*words, *smallest.split()])


def test_a_run_writes_numbers_tables_and_pictures(tmp_path):
    flags = [
        "--variants",
        "sft",
        "decoder",
        "decoder_unpadded",
        "lora",
        "sam",
        "trainer",
        "--no-memory",
        "--curve",
        "length=6",
        "--profile",
    ]
    run(*flags, "--json", f"{tmp_path}/r.json", "--markdown", f"{tmp_path}/r.md", "--plots", str(tmp_path))
    result = json.loads((tmp_path / "r.json").read_text())
    assert [one["case"]["length"] for one in result["cases"]] == [12, 6]
    assert all(one["failed"] == {} and one["ratio"]["sft"] == 1.0 for one in result["cases"])
    assert curve(result, "length")["lora"]["x"] == [6, 12]
    one, floor = result["cases"][0], ["sft", "decoder_unpadded"]  # of one round the median is the ratio
    assert 1 + one["over_floor"]["unpadded"]["lora"] == pytest.approx(
        one["seconds"]["lora"] / sum(one["seconds"][name] for name in floor)
    )
    assert one["quartiles"]["lora"] == [one["ratio"]["lora"]] * 2
    causes = result["profiles"][0]["causes"]["lora"]
    assert causes.pop("total") == pytest.approx(sum(causes.values()))
    assert list(causes) == list(CAUSES)
    text = (tmp_path / "r.md").read_text()
    assert all(
        word in text
        for word in ("*floor, unpadded*", "SAM", "### Along length", "### Profile", *CAUSES, "*all together*")
    )
    assert (tmp_path / "step-cost-length.png").stat().st_size > 1000


def test_out_of_time_writes_what_there_is(tmp_path):
    run("--variants", "sft", "--minutes", "0", "--json", f"{tmp_path}/r.json")
    assert json.loads((tmp_path / "r.json").read_text())["stopped"] == "out of time after 0 of 1 cases"


def test_a_variant_that_cannot_run_is_named_and_the_others_go_on(tmp_path):
    run("--variants", "sft", "lora:alpha=-1", "--no-memory", "--json", f"{tmp_path}/r.json")
    (one,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert list(one["seconds"]) == ["sft"]
    assert "alpha must be" in one["failed"]["lora:alpha=-1"]


def test_floors_alone(capsys):
    run("--floors", "tiny")
    assert "| lora | tiny |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--variants", "lora"], ["--variants", "lroa"], ["--rounds", "0"], ["--curve", "x=1"]]
)
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        step_cost.main(flags)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
