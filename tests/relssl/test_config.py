"""Recipes: strict YAML, overrides, errors that name the nearest known key."""

from __future__ import annotations

import pytest
import yaml

from pipelines.errors import ConfigError, InputError
from relssl.config import Recipe, apply_override, load_recipe, parse_yaml
from relssl.recipes import list_recipes, recipe_path
from tests.relssl import tiny


def write(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(folder, **changes)))
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-4", 5e-4),
        ("-1", -1),
        ("012", 12),
        ("0.5", 0.5),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("null", None),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("'12'", "12"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_yaml_without_traps(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_that_stands_twice_is_an_error():
    with pytest.raises(ConfigError, match="the key 'lr' stands twice"):
        parse_yaml("optim: {lr: 1, lr: 2}", "test")


def test_yaml_builds_no_objects():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "test")


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid(name):
    recipe = load_recipe(recipe_path(name))
    assert recipe.about.command
    first = recipe_path(name).read_text().splitlines()[0]
    assert first == f"# {recipe.about.command}"
    paper = recipe.about.paper
    assert paper is None or paper.source


def test_recipes_carry_the_papers_numbers():
    """spec: ReSSL sections 6, 7 and 10."""
    imagenet = load_recipe(recipe_path("ressl/imagenet_resnet50_5crop"))
    (plan,) = [plan for _, plan in imagenet.views.specs()]
    students = [(s.size, s.box_options["scale"]) for s in plan if s.name == "student"]
    scales = [(0.2, 1.0), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    assert students == list(zip((224, 192, 160, 128, 96), scales, strict=True))
    for spec in plan[1:]:
        jitter, grey, blur = spec.ops
        assert jitter[:2] == ("jitter", 0.8)
        assert jitter[2] == {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        assert grey[:2] == ("grey", 0.2)
        assert blur == ("blur", 0.5, {"sigma": (0.1, 2.0), "kernel": "torchvision"})
        assert spec.flip == 0.5
    assert not plan[0].ops
    strong = load_recipe(recipe_path("ressl/imagenet_resnet50_5crop_strong"))
    (strong_plan,) = [plan for _, plan in strong.views.specs()]
    assert strong_plan[0] == plan[0]
    for spec, (size, (_, largest)) in zip(strong_plan[1:], students, strict=True):
        assert (spec.size, spec.box_options["scale"], spec.flip) == (size, (0.08, largest), 0.5)
        jitter, grey, blur, randaugment = spec.ops
        assert jitter == ("jitter", 0.8, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2})
        assert (grey, blur) == plan[1].ops[1:]
        assert randaugment == ("randaugment", 1.0, {"n": 5, "m": 10})
    same = ("data", "method", "backbone", "optim", "train", "eval")
    assert strong.model_dump(include=set(same)) == imagenet.model_dump(include=set(same))
    assert (imagenet.optim.lr, imagenet.optim.weight_decay, imagenet.optim.exclude) == (0.05, 1e-4, "by_name")
    for data, queue, momentum in (
        ("cifar10", 4096, 0.99),
        ("cifar100", 4096, 0.99),
        ("stl10", 16384, 0.996),
        ("tiny_imagenet", 16384, 0.996),
    ):
        small = load_recipe(recipe_path(f"ressl/{data}_resnet18"))
        method = small.method_config()
        assert (method.queue_size, method.momentum, method.hidden_dim, method.embed_dim) == (queue, momentum, 2048, 128)
        assert (small.optim.lr, small.optim.weight_decay, small.optim.exclude) == (0.06, 5e-4, "none")
        assert small.backbone.norm == "split(8)"
        assert small.backbone.options == {"stem": "cifar" if "cifar" in data else "small"}
        assert (small.train.epochs, small.train.batch_size) == (200, 256)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", r"unknown key in optim: 'learning_rate'.* Known: name, lr"),
        ("optim.schedule.warmup_epoch=1", "did you mean 'warmup_epochs'"),
        ("trian.epochs=1", "did you mean 'train'"),
        ("method.queue_sise=1", "did you mean 'queue_size'"),
        ("method.name=resll", "did you mean 'ressl'"),
        ("train.epochs=many", "train.epochs: .*valid integer.*got 'many'"),
        ("train.epochs=0", "train.epochs: .*greater than 0.*got 0"),
        ("optim.lr=-1", "optim.lr: .*greater than 0.*got -1"),
        ("backbone.norm=split", r"norm is local, sync or split\(n\), got 'split'"),
        ("backbone.name=resnet99", "resnet"),
        ("backbone.widht=2", "did you mean 'width'"),
        ("backbone.norm=split(3)", r"does not divide into the groups of backbone.norm: split\(3\)"),
        ("method.queue_size=3", "smaller than the batch of 16"),
        ("eval.linear.protocol=ressl_smal", "did you mean 'ressl_small'"),
        ("eval.linear.options={lrr: 1}", "lrr"),
        ("optim.schedule.name=exponential", "must be above 0"),
        ("optim.schedule.name=multistep", "needs milestones"),
        ("optim.schedule.final=0.5", r"schedule\.final is 0\.5, above lr 0\.05: the rate would rise"),
        ("optim.schedule={final: 0.01, final_share: 0.1}", "final and final_share say the same thing"),
        ("optim.schedule.warmup_epochs=4", "more than the 3 epochs"),
        ("train.num_micro=3", "batch_size 16 is not a multiple of train.num_micro 3"),
        ("train.num_micro=2", "set train.accumulation: approximate"),
        ("train.drop_last=false", "set train.drop_last: true"),
        ("views.plan=[{name: teacher, size: 12}]", "got 0 'student' view"),
        ("views.plan=[{name: teacher, size: 12}, {name: weak, size: 12}, {name: student, size: 12}]", "called 'weak'"),
        ("views.plan=[{name: teacher, sice: 12}]", "did you mean 'size'"),
        ("views.phases=[]", "either `plan` or `phases`"),
        ("eval.linear.plan=[{size: 0}]", "at least 1, got 0"),
        ("eval.knn.temperature=0.01", r"eval\.knn\.temperature: kNN temperature must be at least 0\.0125 .* got 0\.01"),
        ("eval.knn.temperature=nan", r"eval\.knn\.temperature: kNN temperature must be at least 0\.0125 .* got 'nan'"),
        ("train", "an override is key.sub=value"),
        ("train.epochs.more=1", "epochs is not a section"),
        ("train.epochs=[", "not valid YAML"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(write(tmp_path), [override])


def test_a_changed_recipe_loses_the_papers_row():
    path = recipe_path("ressl/imagenet_resnet50")
    assert load_recipe(path, ["data.train=x.beton", "train.seed=3"]).about.paper is not None
    assert load_recipe(path, ["data.train=x.beton", "train.epochs=100"]).about.paper is None


ASSUMED = {"optim.lr": "a guess", "optim.schedule": "BYOL's", "views.plan.size": "recalled"}


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ([], {*ASSUMED}),
        (["train.seed=3", "optim.momentum=0.5"], {*ASSUMED}),
        (["optim.lr=0.1"], {"optim.schedule", "views.plan.size"}),
        (["optim.schedule.warmup_epochs=2", "optim.lr_scaling=linear"], {"optim.lr", "views.plan.size"}),
        (["views.plan=[{name: teacher, size: 12}, {name: student, size: 12}]"], {"optim.lr", "optim.schedule"}),
    ],
)
def test_what_the_user_chose_is_no_longer_assumed(tmp_path, overrides, left):
    recipe = load_recipe(write(tmp_path, about={"assumptions": ASSUMED}), overrides)
    assert set(recipe.about.assumptions) == left


@pytest.mark.parametrize("key", ["optim.learning_rate", "views.plan.sizes", "lr", "method.temperature.start"])
def test_an_assumption_about_what_is_not_there_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=f"about.assumptions says where {key} comes from, but this recipe has no"):
        load_recipe(write(tmp_path, about={"assumptions": {key: "nowhere"}}))


def test_absent_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        load_recipe(tmp_path / "binary.yaml")


def test_overrides_reach_into_sections():
    values = {"a": {"b": 1}}
    apply_override(values, "a.c.d=1e-3")
    apply_override(values, "a.b=[1, 2]")
    apply_override(values, "e=x=y")
    assert values == {"a": {"b": [1, 2], "c": {"d": 1e-3}}, "e": "x=y"}


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(write(tmp_path), ["optim.lr=1e-3"])
    assert Recipe.model_validate(parse_yaml(recipe.to_yaml(), "saved")) == recipe


def test_a_recipe_of_another_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="format 99"):
        load_recipe(write(tmp_path), ["format=99"])


@pytest.mark.parametrize(
    ("method", "norm", "message"),
    [
        ("rotation", "local", r"split\(n\) would keep them"),
        ("simclr", "split(8)", "the loss and the batch statistics see one micro-batch"),
        ("rotation", "split(8)", None),
    ],
)
def test_accumulation_that_changes_the_result_must_be_asked_for(method, norm, message):
    overrides = ["train.num_micro=2", f"backbone.norm={norm}", "train.drop_last=true"]
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            load_recipe(recipe_path(f"{method}/cifar10_cpu"), overrides)
        overrides.append("train.accumulation=approximate")
    assert load_recipe(recipe_path(f"{method}/cifar10_cpu"), overrides).train.num_micro == 2


def test_a_method_may_refuse_accumulation(monkeypatch):
    from relssl.methods import load_method

    monkeypatch.setattr(load_method("rotation"), "ACCUMULATION", "refused")
    with pytest.raises(ConfigError, match=r"rotation cannot accumulate gradients; set train\.num_micro: 1, got 2"):
        load_recipe(recipe_path("rotation/cifar10_cpu"), ["train.num_micro=2", "train.accumulation=approximate"])
