"""`relssl bench losses`: the textbook's losses are ours, memory is counted rightly, unequal losses are not raced."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.markdown import table
from pipelines.errors import ConfigError, RunError
from relssl import cli, config, recipes
from relssl.bench import footprint as measures
from relssl.bench import loss_cases, loss_table, losses, naive
from relssl.bench.loss_cases import CASES, NAIVE, OURS, Backbone, LossCase, Pass, Problem
from relssl.bench.losses import Settings, bench_losses
from relssl.losses import relation_pairs_loss
from relssl.nets import RelationHead, build_backbone
from tests.relssl.counting import Allocations

CPU = torch.device("cpu")
SMALL = {"images": 5, "views": 7, "features": 6, "hidden": 8, "crops": 3, "queue": 40, "large": 2, "small": 1}
SMALL["negatives"] = 3


def small_sizes(case: LossCase) -> dict[str, int]:
    return {name: SMALL[name] for name in case.sizes}


def small_settings(*cases: str, **changes: Any) -> Settings:
    names = cases or ("nt-xent",)
    sizes = {name: size for case in names for name, size in small_sizes(CASES[case]).items()}
    quick = {"cases": names, "sizes": sizes, "device": "cpu", "rounds": 2, "seconds": 1e-9, "step": False}
    return Settings(**{**quick, **changes})


def quiet(line: str) -> None:
    pass


# -- the textbook's forms


@pytest.mark.parametrize("dtype", losses.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_all_forms_are_one_loss(name: str, dtype: str) -> None:
    case = CASES[name]
    problem = case.make(small_sizes(case), losses.DTYPES[dtype], CPU, torch.Generator())
    assert list(problem.forms)[:2] == [OURS, NAIVE]
    found = losses._compare([losses._Runner(form, problem, dtype, CPU) for form in problem.forms], case, dtype, quiet)
    assert list(found) == list(problem.forms)[1:]
    for apart in found.values():
        assert list(apart["leaves"]) == list(problem.leaves)
        if dtype == "fp64":
            assert apart["loss"] < 1e-13
            assert apart["gradient"] < 1e-12


@pytest.mark.parametrize("aggregation", ["cat", "sum", "mean", "max"])
@pytest.mark.parametrize(("views", "images"), [(2, 2), (5, 3), (3, 6)])
def test_pairs_in_a_loop_and_gathered_are_ours(views: int, images: int, aggregation: str) -> None:
    torch.manual_seed(0)
    head = RelationHead(4, 8, aggregation).double()
    features = torch.rand(views * images, 4, dtype=torch.float64, requires_grad=True)
    leaves = [features, *head.parameters()]
    expected = relation_pairs_loss(features, head, views=views)[0]
    grads = torch.autograd.grad(expected, leaves)
    for form in (naive.looped_pairs_loss, naive.gathered_pairs_loss):
        value = form(features, head, views)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        for found, grad in zip(torch.autograd.grad(value, leaves), grads, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-12)


def test_the_loop_rolls_as_the_paper_does() -> None:
    shifts = [shift for _, _, shift in naive.view_pairs(4, 4)]
    assert shifts == [1, 2, 3, 1, 2, 3]
    left, right = naive.pair_rows(2, 3, CPU)
    assert left.tolist() == [0, 1, 2, 0, 1, 2]
    assert right.tolist() == [3, 4, 5, 5, 3, 4]


def test_published_sizes_are_those_of_the_recipes() -> None:
    for case, name in (
        ("ressl-small", "ressl/cifar10_resnet18"),
        ("ressl-1crop", "ressl/imagenet_resnet50"),
        ("ressl-5crop", "ressl/imagenet_resnet50_5crop"),
    ):
        recipe = config.load_recipe(recipes.recipe_path(name))
        ((_, plan),) = recipe.views.specs()
        sizes = CASES[case].sizes
        (backbone,) = CASES[case].backbones
        assert sizes["images"] == recipe.train.batch_size
        assert sizes["features"] == recipe.method["embed_dim"]
        assert sizes["queue"] == recipe.method["queue_size"]
        assert backbone.name == recipe.backbone.name
        passes = backbone.passes(sizes)
        assert [(entry.side, entry.trains) for entry in passes] == [(s.size, s.name == "student") for s in plan]
        assert {entry.count for entry in passes} == {recipe.train.batch_size}
    for case, name in (("relation-cat", "relational/cifar10_resnet56"), ("nt-xent-small", "simclr/cifar10_resnet32")):
        recipe = config.load_recipe(recipes.recipe_path(name))
        ((_, (view,)),) = recipe.views.specs()
        assert CASES[case].sizes["images"] == recipe.train.batch_size
        assert CASES[case].sizes.get("views", 2) == view.count
        backbone = {backbone.name: backbone for backbone in CASES[case].backbones}[recipe.backbone.name]
        assert backbone.passes(CASES[case].sizes) == [Pass(recipe.train.batch_size * view.count, view.size)]


# -- what is not the same is not raced


def wrong_value(view1: Tensor, view2: Tensor, *, temperature: float) -> Tensor:
    return textbook(view1, view2, temperature=temperature) + 0.001


def wrong_gradient(view1: Tensor, view2: Tensor, *, temperature: float) -> Tensor:
    value = textbook(view1, view2, temperature=temperature)
    return value + 0.001 * (view2 - view2.detach()).sum()


def not_a_number(view1: Tensor, view2: Tensor, *, temperature: float) -> Tensor:
    return torch.nan * textbook(view1, view2, temperature=temperature)


textbook = naive.nt_xent


@pytest.mark.parametrize("form", [wrong_value, wrong_gradient, not_a_number])
def test_another_loss_is_an_error_before_anything_is_timed(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive, "nt_xent", form)
    monkeypatch.setattr(losses, "_race", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RunError, match="nt-xent: ours and the form 'naive' are not the same loss in fp32") as raised:
        bench_losses(small_settings(), say=quiet)
    if form is wrong_gradient:
        assert "view2" in str(raised.value)


def test_where_rounding_hides_it_float64_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = naive.gathered_pairs_loss
    monkeypatch.setattr(naive, "gathered_pairs_loss", lambda *arguments: exact(*arguments) * (1 + 3e-6))
    with pytest.raises(RunError, match="not the same loss in fp64"):
        bench_losses(small_settings("relation-cat"), say=quiet)


def test_the_program_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "losses", "--case", "nt-xent", "--no-step", "--rounds", "1", "--seconds", "1e-9"]
    arguments += ["--size", "images=4", "--size", "features=3", "--device", "cpu"]
    assert cli.run(arguments) == 0
    capsys.readouterr()
    monkeypatch.setattr(naive, "nt_xent", wrong_value)
    assert cli.run(arguments) == 1
    out = capsys.readouterr()
    assert "not the same loss" in out.err
    assert "ms a call" not in out.out


def test_differences_are_relative_to_each_leaf_but_for_noughts() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    problem = Problem({"a": a, "b": b}, {}, noughts=frozenset({"b"}))
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0, 0.0])]
    others = [torch.tensor([3.0, 4.5]), torch.tensor([0.0, 0.0, 0.01])]
    found = losses.difference(problem, torch.tensor(2.0), grads, torch.tensor(2.5), others)
    assert found["loss"] == pytest.approx(0.2)
    assert found["leaf"] == "a"
    assert found["leaves"] == pytest.approx({"a": 0.5 / 29.25**0.5, "b": 0.01 / (29.25 + 0.0001) ** 0.5})
    found = losses.difference(
        problem, torch.tensor(2.0), grads, torch.tensor(2.0), [others[0], torch.full((3,), torch.nan)]
    )
    assert found["leaf"] == "b"


# -- the measures


def test_peak_of_known_allocations() -> None:
    def call() -> Tensor:
        first = torch.ones(1 << 18)  # 1 MiB
        second = torch.ones(1 << 19)  # 2 MiB: 3 MiB together
        del first
        third = torch.ones(1 << 17)  # 0.5 MiB beside the second: 2.5 MiB
        return second[: 1 << 17] + third  # 0.5 MiB more: 3 MiB

    inputs = torch.ones(1 << 20)
    assert measures.footprint(call, CPU).peak_bytes == 3 << 20
    found = measures.footprint(lambda: inputs * 2, CPU).peak_bytes  # what was there does not count
    assert found == pytest.approx(4 << 20, abs=64)  # the 2 is a tensor, too
    assert measures.footprint(lambda: inputs[1 << 19 :].view(4, -1), CPU) == (0, 0)
    assert measures.peak_of([]) == 0


def test_what_is_made_once_is_not_its_cost() -> None:
    made: list[Tensor] = []

    def call() -> Tensor:
        if not made:
            made.append(torch.ones(1 << 20))
        return torch.ones(1 << 10)

    assert measures.footprint(call, CPU) == (4 << 10, 1)


def test_the_peak_is_that_of_the_dispatcher() -> None:
    """Another way to count, of the same computation."""
    case = CASES["relation-cat"]
    problem = case.make({**small_sizes(case), "images": 16, "hidden": 64}, torch.float32, CPU, torch.Generator())
    for form in problem.forms.values():

        def call(form: Any = form) -> object:
            return torch.autograd.grad(form(), list(problem.leaves.values()))

        with Allocations() as seen:
            call()
        assert measures.footprint(call, CPU).peak_bytes == pytest.approx(seen.peak, rel=0.05)


@pytest.mark.slow
def test_operators_that_compute_are_counted_once() -> None:
    x, weight = torch.rand(3, 4), torch.rand(5, 4)

    def operators(call: Any) -> int:
        return measures.footprint(call, CPU).launches

    assert operators(lambda: F.linear(x, weight)) == 1  # transpose, matmul and mm are one product
    assert operators(lambda: F.linear(x, weight).relu_().sum()) == 3
    assert operators(lambda: x.T.reshape(2, 6)) == 1  # a copy
    assert operators(lambda: x.reshape(2, 6).t().unsqueeze(0).expand(7, -1, -1)) == 0
    assert operators(lambda: torch.empty(3)) == 0
    assert operators(lambda: [x + 1 for _ in range(9)]) == 9


@pytest.mark.parametrize(("name", "kib"), [("conv4", 146), ("resnet8", 636)])
def test_what_backward_keeps_of_a_backbone(name: str, kib: int) -> None:
    net = build_backbone(name)
    two, four = (measures.bytes_for_backward(net, torch.rand(count, 3, 32, 32)) for count in (2, 4))
    assert four - two == 2 * kib * 1024


def test_what_backward_keeps_counts_each_storage_once_and_no_parameter() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.rand(16, 8)
    assert measures.bytes_for_backward(net, x) == 4 * (16 * 8 + 16 * 4)


# -- turns and the rest of the step


@pytest.mark.slow
def test_turns_rotate_and_ratios_stand_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    turns: list[str] = []
    monkeypatch.setattr(losses, "perf_counter", lambda: float(sum(range(next(clock)))))  # every span is longer
    real = losses._Runner.take_turn

    def take_turn(runner: Any) -> None:
        turns.append(runner.name)
        real(runner)

    monkeypatch.setattr(losses._Runner, "take_turn", take_turn)
    result = bench_losses(small_settings("relation-sum", rounds=3), say=quiet)
    (measurement,) = result["measurements"]
    a, b, c = (form["name"] for form in measurement["forms"])
    assert turns == [a, b, c, b, c, a, c, a, b]
    ours, *others = (form["seconds"]["values"] for form in measurement["forms"])
    for entry, other in zip(measurement["ratios"], others, strict=True):
        assert entry["time"]["values"] == pytest.approx([b / a for a, b in zip(ours, other, strict=True)])
        assert len(set(entry["time"]["values"])) == 3


def test_a_turn_is_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem({}, {OURS: lambda: torch.zeros(())})
    runner = losses._Runner(OURS, problem, "fp32", CPU)
    calls: list[int] = []
    monkeypatch.setattr(runner, "time", lambda count: calls.append(count) or 0.02 * count)
    losses._race([runner], Settings(rounds=2, seconds=0.5), quiet)
    assert calls == [1, 25, 25]


def test_times_are_of_one_call_and_threads_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=6)
    monkeypatch.setattr(losses, "perf_counter", lambda: float(next(clock)))
    x = torch.ones(1, requires_grad=True)
    runner = losses._Runner(OURS, Problem({"x": x}, {OURS: lambda: x.sum()}), "fp32", CPU)
    assert runner.time(4) == 1.5
    before, seen = torch.get_num_threads(), set()
    result = bench_losses(small_settings(threads=before + 1), say=lambda line: seen.add(torch.get_num_threads()))
    assert seen == {before + 1}
    assert result["settings"]["threads"] == result["environment"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_a_large_backbone_is_timed_on_some_images_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=3)
    monkeypatch.setattr(losses, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(losses, "_ACTIVATIONS_ON_CPU", 5 * 146 * 1024)
    rest = Backbone("conv4", lambda sizes: [Pass(sizes["images"], 32, trains=False), Pass(20, 32), Pass(4, 32)])
    forms = [{"name": OURS, "seconds": {"median": 2.0}}, {"name": NAIVE, "seconds": {"median": 8.0}}]
    step = losses._step(rest, {"images": 10}, forms, torch.float32, CPU, quiet)
    assert [entry["images_timed"] for entry in step["passes"]] == [5, 5, 4]
    assert [entry["seconds"] for entry in step["passes"]] == [6.0, 12.0, 3.0]
    assert [entry["activation_bytes"] for entry in step["passes"]] == [0, 20 * 146 * 1024, 4 * 146 * 1024]
    assert step["activation_bytes"] == 24 * 146 * 1024
    assert step["seconds"] == 21.0
    assert step["share"] == {OURS: 2 / 23, NAIVE: 8 / 29}
    assert step["ratio"] == {NAIVE: 29 / 23}


# -- the whole of it


@pytest.mark.slow
def test_a_run_gives_text_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(CASES["relation-cat"], backbones=CASES["relation-cat"].backbones[:1])  # ResNet-56 takes seconds
    monkeypatch.setitem(loss_cases.CASES, "relation-cat", quick)
    lines: list[str] = []
    run = small_settings("relation-cat", "nt-xent-small", threads=1, step=True)
    result = bench_losses(run, command="relssl bench losses", say=lines.append)
    assert any("rounds take about" in line for line in lines)
    result = json.loads(json.dumps(result))

    relation, contrast = result["measurements"]
    assert result["benchmark"] == "losses"
    assert result["command"] == "relssl bench losses"
    assert result["settings"]["device"] == "cpu"
    assert result["versions"]["torch"]
    assert result["environment"]["processor"]
    assert len(result["load"]) == 3  # before, and after each case
    assert "argv" not in result["environment"]
    assert [form["name"] for form in relation["forms"]] == [OURS, NAIVE, "naive loop"]
    assert [form["is_ours"] for form in relation["forms"]] == [True, False, False]
    assert relation["sizes"] == {"images": 5, "views": 7, "features": 6, "hidden": 8}
    assert [step["backbone"] for step in relation["steps"]] == ["conv4"]
    assert [entry["images"] for entry in relation["steps"][0]["passes"]] == [35]
    assert not relation["published_sizes"]
    assert relation["ratios"][0]["targets"] == {}
    for measurement in (relation, contrast):
        ours = measurement["forms"][0]
        for entry, form in zip(measurement["ratios"], measurement["forms"][1:], strict=True):
            assert entry["form"] == form["name"]
            assert entry["memory"] == pytest.approx(form["peak_bytes"] / ours["peak_bytes"])
            assert form["launches"] > 0
            assert len(form["seconds"]["values"]) == 2
        step = measurement["steps"][0]
        for form in measurement["forms"]:
            seconds = form["seconds"]["median"]
            assert step["share"][form["name"]] == pytest.approx(seconds / (seconds + step["seconds"]))

    text = loss_table.text(result)
    for expected in (
        "relation-cat (images 5, views 7",
        "not the published sizes",
        "naive loop",
        "operators",
        "conv4",
        "load average",
    ):
        assert expected in text
    assert "wanted" not in text
    rows = table(result)
    assert "| relation-cat" in rows
    assert "| nt-xent-small" in rows
    for name, start in (("losses.svg", b"<?xml"), ("losses.png", b"\x89PNG")):
        written = losses.write_outputs(result, tmp_path / "losses.json", tmp_path / name)
        assert written == [tmp_path / "losses.json", tmp_path / name]
        assert (tmp_path / name).read_bytes().startswith(start)
    assert json.loads((tmp_path / "losses.json").read_text()) == result


def test_targets_are_for_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["relation-sum"]
    tiny = LossCase(case.name, case.title, small_sizes(case), case.make, (), case.least, case.targets, case.kinked)
    monkeypatch.setitem(loss_cases.CASES, case.name, tiny)
    result = bench_losses(small_settings(case.name), say=quiet)
    assert result["measurements"][0]["ratios"][0]["targets"] == {"time": 3.0, "memory": 10.0}
    text = loss_table.text(result)
    assert "at least 3 wanted" in text
    assert "at least 10 wanted" in text
    assert "not the published sizes" not in text


def test_everything_is_measured_unless_named() -> None:
    assert loss_cases.find_cases(None) == list(CASES.values())
    assert loss_cases.find_cases(["nt-xent", "relation-max", "nt-xent"]) == [CASES["nt-xent"], CASES["relation-max"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": ["relation-cart"]}, "unknown case: 'relation-cart'; did you mean 'relation-cat'"),
        ({"sizes": {"queue": 8}}, "unknown size of nt-xent: 'queue'. Known: images, features"),
        ({"sizes": {"images": 0}}, "--size images: nt-xent needs at least 1, got 0"),
        ({"cases": ["relation-max"], "sizes": {"views": 1}}, "--size views: relation-max needs at least 2, got 1"),
        ({"dtype": "fp8"}, "unknown dtype: 'fp8'"),
        ({"device": "gpu"}, "--device is auto, cpu"),
        ({"device": "meta"}, "measured on cpu or cuda, got meta"),
        ({"rounds": 0}, "--rounds is at least 1"),
        ({"threads": 0}, "--threads is at least 1"),
        ({"seconds": 0.0}, "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_losses(small_settings(**wrong), say=quiet)


@pytest.mark.parametrize("text", ["queue", "queue=", "=5", "queue=-5", "queue=4.5", "queue=²"])
def test_sizes_are_name_and_number(text: str) -> None:
    assert losses.size_settings(["queue=16", "images=2"]) == {"queue": 16, "images": 2}
    with pytest.raises(ConfigError, match="--size takes NAME=NUMBER"):
        losses.size_settings([text])


@pytest.mark.parametrize(
    "arguments", [["--size", "queue"], ["--case", "none"], ["--json", "none/x.json"], ["--plot", "x.txt"]]
)
def test_the_program_refuses_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "losses", *arguments]) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to", "bug"])
def test_a_form_that_does_not_fit_says_so(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Tensor, **__: float) -> Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(naive, "nt_xent", fails)
    expected, words = (RunError, "naive does not fit the memory") if "allocate" in message else (RuntimeError, "^bug$")
    with pytest.raises(expected, match=words):
        bench_losses(small_settings(), say=quiet)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    result = bench_losses(small_settings("relation-cat", "ressl-small", device="cuda", step=True), say=quiet)
    for measurement in result["measurements"]:
        assert all(form["launches"] > 0 and form["peak_bytes"] > 0 for form in measurement["forms"])
    inputs = torch.ones(1 << 20, device="cuda")
    found = measures.footprint(lambda: inputs * 2, torch.device("cuda"))
    assert found == (4 << 20, 1)


def test_the_profiler_stays_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    measures.footprint(lambda: torch.ones(3), CPU)
    assert capfd.readouterr() == ("", "")
