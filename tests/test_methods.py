"""What holds for every method. Methods are found by their files, and each is built from its recipe `cifar10_cpu`.

A new method is tested here as soon as there are `relssl/methods/<name>.py` and `configs/<name>/cifar10_cpu.yaml`.
A method in a file of one's own is tested by `pytest tests/test_methods.py --recipe FILE.yaml`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pipelines import beton
from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError, InputError, RunError
from pipelines.loader import ViewLoader
from relssl.build import build_method, make_optimizer, make_schedule
from relssl.cli.base import load
from relssl.config import Recipe
from relssl.evaluate import initial_backbone, open_weights
from relssl.methods import base, load_method, method_names
from relssl.methods.base import Method, Step
from relssl.runfolder import RunFolder
from relssl.train import data_info, run_update, train
from tests.pipelines.test_crop import smooth_images
from tests.pipelines.test_loader import damage, jpeg
from tests.relssl import tiny
from tests.relssl.dist_helpers import run_ranks
from tests.relssl.test_train import assert_equal_states, final_state
from tests.relssl.wcl_in_one_process import wcl_loss_of_two_processes

ROOT = Path(__file__).resolve().parents[1]
NAMES = method_names()
TRAINED = [name for name in NAMES if load_method(name).TRAINS]
BATCH = 16
SMALL = {"ressl": ["method.queue_size=48"], "deepcluster": ["method.num_clusters=4"]}
# What an argument of a test runs over, where no recipe is given: names of methods, each standing for its recipe.
GROUPS = {
    "name": TRAINED,
    "any_name": NAMES,
    **{f"{kind}_name": [n for n in TRAINED if kind == load_method(n).PROCESSES] for kind in base.PROCESS_KINDS},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each method of a group. With `--recipe` there is that recipe alone, in the groups of its method."""
    recipe = metafunc.config.getoption("recipe")
    for argument, names in GROUPS.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names if recipe is None else [recipe] * _belongs(argument, recipe))


def _belongs(argument: str, recipe: str) -> bool:
    return argument in ("name", "any_name", f"{method_class(recipe).PROCESSES}_name")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny.write_data(folder / "train.beton", side=32)
    tiny.write_data(folder / "test.beton", seed=1, side=32)
    return folder


def recipe_of(name: str, data: Path, *overrides: str) -> Recipe:
    return load(
        recipe_name(name),
        [
            f"data.train={data / 'train.beton'}", f"data.test={data / 'test.beton'}", "data.engine=resident",
            f"train.batch_size={BATCH}", "train.epochs=2", "train.log_every=1", "optim.schedule.name=constant",
            "eval.online=null", *SMALL.get(name, []), *overrides,
        ],
    )  # fmt: skip


def recipe_name(name: str) -> str:
    """Of a method's name, or of a recipe's own."""
    return f"{name}/cifar10_cpu" if name in NAMES else name


def method_class(name: str) -> type[Method]:
    return load_method(str(load(recipe_name(name), []).method["name"]))


class Rig:
    """A method with its optimizer and loader, as the trainer sets them up."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.float32, rank: int = 0, world: int = 1):
        self.recipe = recipe
        self.loader = ViewLoader(
            recipe.data.train, recipe.views.specs(), global_batch=recipe.train.batch_size,
            num_micro=recipe.train.num_micro, engine="resident", device=torch.device("cpu"), seed=0, dtype=dtype,
            rank=rank, world_size=world, drop_last=True, workers=1,
        )  # fmt: skip
        self.info = data_info(recipe, self.loader)
        self.method = build_method(recipe, self.info).to(dtype).train()
        self.optimizer = make_optimizer(recipe.optim, self.method)
        self.schedule = make_schedule(recipe.optim, 3, 6, recipe.train.batch_size)
        self.updates = 0

    def begin_epoch(self) -> Iterator[Any]:
        torch.manual_seed(1)
        features = torch.randn(self.info.num_samples, self.method.encoder.feature_dim).abs()
        self.method.before_epoch(Step(self.updates, 0), lambda: features)
        self.loader.set_position(0, 0)
        return iter(self.loader)

    def update(self, batches: Iterator[Any], ddp: torch.nn.Module | None = None) -> dict[str, Tensor]:
        step = Step(self.updates, 0, num_micro=self.recipe.train.num_micro)
        micro_batches = [next(batches) for _ in range(step.num_micro)]
        self.updates += 1
        return run_update(
            ddp or self.method, self.optimizer, micro_batches, step, schedule=self.schedule, num_images=BATCH
        )


def test_every_method_has_its_recipe() -> None:
    assert {path.parent.name for path in (ROOT / "configs").glob("*/cifar10_cpu.yaml")} == set(NAMES)


def test_an_update_moves_what_trains_and_nothing_else(name: str, data: Path) -> None:
    rig = Rig(recipe_of(name, data))
    before = {key: value.clone() for key, value in rig.method.named_parameters()}
    batch = next(rig.begin_epoch())
    loss, metrics = rig.method(batch, Step(0, 0))
    assert (loss.dim(), loss.dtype) == (0, torch.float32)
    assert loss.isfinite()
    assert all(m.dim() == 0 and not m.requires_grad and m.isfinite() for m in metrics.values())
    assert any(key.endswith("_spread") for key in metrics)
    loss.backward()
    for key, parameter in rig.method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.requires_grad and not key.endswith(".bias"):  # a BatchNorm takes the one before it out again
            assert (parameter.grad != 0).any(), key
    rig.method.zero_grad()
    rig.update(rig.begin_epoch())
    for key, parameter in rig.method.named_parameters():
        if not parameter.requires_grad:
            assert key.startswith(("teacher.", "target.")), key
    assert any(not torch.equal(before[k], p) for k, p in rig.method.encoder.named_parameters(prefix="encoder"))


def test_an_update_does_not_wait_for_the_device(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta` nothing has a value: whatever would bring one to the host, or needs one for a shape, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know `meta`
    rig = Rig(recipe_of(name, data))
    batch = next(rig.begin_epoch())
    rig.method.to("meta")
    there = ViewBatch(
        {view: tuple(x.to("meta") for x in tensors) for view, tensors in batch.views.items()},
        *(x.to("meta") for x in (batch.index, batch.label, batch.position)),
    )
    metrics = rig.update(iter([there]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics["loss"].item()


def test_the_encoder_is_built_first(any_name: str, data: Path) -> None:
    """`--random-init` builds a backbone and nothing else; these must be the weights that a run starts from."""
    recipe = recipe_of(any_name, data)
    assert_equal_states(Rig(recipe).method.encoder.state_dict(), initial_backbone(recipe).state_dict())


def test_a_run_is_a_function_of_its_seed(name: str, data: Path, tmp_path: Path) -> None:
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(recipe_of(name, data, f"train.seed={seed}"), tmp_path / run) == 0
    assert_equal_states(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_equal_states(final_state(tmp_path / "a"), final_state(tmp_path / "c"))


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside an epoch, so that what `before_epoch` made must come out of the checkpoint."""
    options = ["train.checkpoint.every_updates=1", "train.checkpoint.keep=10"]
    train(recipe_of(name, data, *options), tmp_path / "whole")
    train(recipe_of(name, data, *options), tmp_path / "cut")
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    for path in checkpoints[4:]:  # updates 5, 6 and the end
        (path / "COMPLETE").unlink()
    calls: list[int] = []
    cls = method_class(name)
    original = cls.before_epoch
    monkeypatch.setattr(cls, "before_epoch", lambda self, step, encode: (calls.append(1), original(self, step, encode)))
    train(recipe_of(name, data, *options), tmp_path / "cut", resume=True)
    assert not calls  # the second epoch had begun
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


def test_state_survives_save_and_load(name: str, data: Path) -> None:
    rig = Rig(recipe_of(name, data))
    batches = rig.begin_epoch()
    rig.update(batches)
    other = Rig(recipe_of(name, data, "train.seed=5"))
    other.method.load_state_dict(copy.deepcopy(rig.method.state_dict()))
    batch = next(batches)
    results = []
    for method in (rig.method, other.method):
        torch.manual_seed(0)
        results.append(method(batch, Step(1, 0))[0])
    assert torch.equal(*results)


def test_a_wrong_view_plan_is_refused_before_the_first_step(any_name: str, data: Path) -> None:
    cls = method_class(any_name)
    view, (low, high) = next(iter(cls.VIEWS.items()))
    spec = {"name": view, "size": 32, "box": "whole"}
    wrong: list[tuple[list[dict[str, Any]], str]] = [
        ([*_least(cls), {**spec, "name": "other"}], "no view called 'other'")
    ]
    if low:
        wrong.append(([s for s in _least(cls) if s["name"] != view] or [{**spec, "name": "other"}], f"got 0 '{view}'"))
    if high is not None:
        wrong.append(([*_least(cls), {**spec, "count": high}], f"'{view}' view"))
    if "one_size" in cls.NEEDS:
        wrong.append(([spec, {**spec, "size": 24}], "of one size, got 24, 32 pixels"))
    for plan, message in wrong:
        with pytest.raises(ConfigError, match=message) as refused:
            recipe_of(any_name, data, f"views.plan={_yaml(plan)}", "views.phases=null")
        if "no view" in message or "got 0" in message:
            assert all(f"{needed}: " in str(refused.value) for needed in cls.VIEWS)


def test_the_fewest_and_the_most_views_do(name: str, data: Path) -> None:
    cls = method_class(name)
    most = {view: low + 2 if high is None else high for view, (low, high) in cls.VIEWS.items()}
    for plan in (_least(cls), _plan(most)):
        rig = Rig(recipe_of(name, data, f"views.plan={_yaml(plan)}", "views.phases=null"))
        assert rig.update(rig.begin_epoch())["loss"].isfinite()


def _least(cls: type[Method]) -> list[dict[str, Any]]:
    return _plan({view: low for view, (low, _) in cls.VIEWS.items() if low})


def _plan(counts: dict[str, int]) -> list[dict[str, Any]]:
    return [{"name": view, "size": 32, "box": "whole", "count": count} for view, count in counts.items()]


def _yaml(plan: list[dict[str, Any]]) -> str:
    return yaml.safe_dump(plan, default_flow_style=True, width=10_000).strip()


def test_the_loss_is_wide_under_autocast(name: str, data: Path) -> None:
    """Seen without Accelerate, which widens what a method returns."""
    rig = Rig(recipe_of(name, data))
    batch = next(rig.begin_epoch())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = rig.method(batch, Step(0, 0))
    assert loss.dtype == torch.float32


@pytest.mark.slow
def test_thirty_updates_under_bfloat16_stay_finite(name: str, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name, data, "train.precision=bf16", "train.epochs=10", "train.checkpoint.every_epochs=10")
    assert train(recipe, tmp_path / "run") == 0
    records = RunFolder(tmp_path / "run").read_metrics()
    assert len(records) == 30
    assert all(torch.tensor(record["loss"]).isfinite() for record in records)


# -- several processes -------------------------------------------------------------------------------------------------


def state_after(rank: int, name: str, folder: str, world: int, num_micro: int, norm: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    recipe = recipe_of(
        name, Path(folder), "train.precision=fp64", f"train.num_micro={num_micro}", "train.accumulation=approximate",
        f"backbone.norm={norm}", "train.drop_last=true",
    )  # fmt: skip
    rig = Rig(recipe, torch.float64, rank, world)
    ddp: torch.nn.Module = rig.method
    if world > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(rig.method, broadcast_buffers=False)
    batches = rig.begin_epoch()
    for _ in range(3):
        rig.update(batches, ddp)
    return {key: value.detach().clone() for key, value in rig.method.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sync", "split(4)"])
def test_two_processes_equal_one(joint_name: str, norm: str, data: Path) -> None:
    one = state_after(0, joint_name, str(data), 1, 1, norm)
    two = run_ranks(state_after, 2, joint_name, str(data), 2, 1, norm)
    for key, value in one.items():
        torch.testing.assert_close(two[0][key], value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(two[1][key], two[0][key], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_equal_two_micro_batches(local_name: str, data: Path) -> None:
    """Each half of the batch is on its own: the update is the mean of both halves' gradients.

    Running statistics are those of the first half, of both in turn with micro-batches; they do not act on training.
    """
    one = state_after(0, local_name, str(data), 1, 2, "local")
    two = run_ranks(state_after, 2, local_name, str(data), 2, 1, "local")[0]
    for key, value in one.items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def _refusal(rank: int, name: str, folder: str) -> str:
    try:
        recipe_of(name, Path(folder), "train.drop_last=false")
    except ConfigError as error:
        return str(error)
    return ""


def _first_loss(rank: int, name: str, folder: str, world: int) -> dict[str, Tensor]:
    """Every gradient of the first update's loss, and the batch's places."""
    rig = Rig(recipe_of(name, Path(folder), "train.precision=fp64", "backbone.norm=sync"), torch.float64, rank, world)
    batch = next(rig.begin_epoch())
    loss, _ = rig.method(batch, Step(0, 0))
    loss.backward()
    return {"loss": loss.detach(), **{key: p.grad for key, p in rig.method.named_parameters() if p.grad is not None}}


@pytest.mark.slow
def test_two_processes_hold_the_others_constant(constants_name: str, data: Path) -> None:
    """The sum over both processes of gradients of their own rows, in one process: the rows of the other half are cut
    off from the graph where a process would have gathered them."""
    two = run_ranks(_first_loss, 2, constants_name, str(data), 2)
    rig = Rig(recipe_of(constants_name, data, "train.precision=fp64", "backbone.norm=sync"), torch.float64)
    batch = next(rig.begin_epoch())
    wcl_loss_of_two_processes(rig.method, batch).backward()
    for key, parameter in rig.method.named_parameters():
        mean = (two[0][key] + two[1][key]) / 2
        torch.testing.assert_close(mean, parameter.grad, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_methods_that_gather_want_equal_shares(data: Path) -> None:
    assert "on each of the 2 processes: set train.drop_last: true" in run_ranks(_refusal, 2, "simclr", str(data))[1]
    assert run_ranks(_refusal, 2, "rotation", str(data)) == ["", ""]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_random_weights_are_saved_as_they_are(data: Path, tmp_path: Path) -> None:
    assert train(recipe_of("random", data, "eval.online={every_epochs: 1}"), tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    kept, fresh = open_weights(tmp_path / "run"), open_weights(tmp_path / "run", random_init=True)
    assert (kept.epochs, kept.origin) == (0, "random")
    assert_equal_states(kept.backbone.state_dict(), fresh.backbone.state_dict())
    assert [record["kind"] for record in folder.read_metrics()] == ["eval"]
    quiet = recipe_of("random", data)  # no evaluation, no metrics: the folder is taken all the same
    assert train(quiet, tmp_path / "quiet") == 0
    with pytest.raises(ConfigError, match="holds a run already"):
        train(quiet, tmp_path / "quiet")
    assert "trains nothing" in folder.log.read_text()


def test_labels_are_asked_for_where_they_are_needed(data: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "train.beton", labels=False, side=32)
    recipe = recipe_of("supervised", data, f"data.train={tmp_path / 'train.beton'}")
    with pytest.raises(ConfigError, match="supervised needs a label for every image"):
        train(recipe, tmp_path / "run")


def test_collapsed_features_stop_a_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = load_method("simclr")
    forward = cls.forward

    def collapsing(self: Any, batch: Any, step: Step) -> Any:
        loss, metrics = forward(self, batch, step)
        return loss, {**metrics, "embedding_spread": torch.tensor(1e-7 if step.update >= 4 else 0.5)}

    monkeypatch.setattr(cls, "forward", collapsing)
    with pytest.raises(RunError, match=r"the embedding collapsed.*at update 5\. The last good checkpoint is .*000003"):
        train(recipe_of("simclr", data), tmp_path / "run")
    # Not seen by a report either: the next checkpoint is not written.
    with pytest.raises(RunError, match=r"at update 6\. The last good checkpoint is .*000003"):
        train(recipe_of("simclr", data, "train.log_every=100"), tmp_path / "quiet")


def test_weights_that_blow_up_collapse_the_features(data: Path, tmp_path: Path) -> None:
    """A real one: after a step of a million the same few units answer to every image."""
    with pytest.raises(RunError, match=r"(collapsed|is nan|is inf|not finite).*last good checkpoint"):
        train(recipe_of("supervised", data, "optim.lr=1e12"), tmp_path / "run")


def test_features_that_cannot_be_clustered_name_step_and_checkpoint(data: Path, tmp_path: Path) -> None:
    cls = load_method("deepcluster")

    def break_encoder(self: Any, step: Step) -> None:
        if step.update == 2:  # of three in an epoch; the checkpoint of update 1 is whole
            self.encoder.layer1.bn.weight.data.fill_(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "after_update", break_encoder)
        with pytest.raises(
            RunError, match=r"the features collapsed.*at update 3\. The last good checkpoint is .*000003"
        ):
            train(recipe_of("deepcluster", data), tmp_path / "run")


def test_an_unreadable_image_does_not_end_a_run_that_clusters(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "jpegs.beton"
    beton.write(path, ((jpeg(image), i % 2) for i, image in enumerate(smooth_images(48, 32, 32))), classes=tiny.CLASSES)
    damage(path, [0])
    recipe = recipe_of("deepcluster", data, f"data.train={path}")
    assert train(recipe, tmp_path / "run") == 0


def test_views_that_are_too_small_for_the_backbone(data: Path) -> None:
    with pytest.raises(ConfigError, match="backbone conv4 cannot take views of 4 pixels"):
        recipe_of("rotation", data, "views.plan=[{name: view, size: 4, box: whole}]")


def test_one_image_per_process_is_refused(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of("relational", data, "train.num_micro=16", "train.accumulation=approximate")
    with pytest.raises(ConfigError, match=r"leaves 1 for each, and batch statistics and pairs need 2"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "has no class Method"),
        ("from relssl.methods.simclr import Config", "cannot be loaded: ImportError"),
        (None, "no method file"),
    ],
)
def test_a_method_file_that_is_none(tmp_path: Path, source: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises((ConfigError, InputError), match=message):
        load_method(str(path))


def test_features_come_in_file_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `before_epoch` gets to see."""
    seen: list[Tensor] = []
    cls = load_method("deepcluster")
    monkeypatch.setattr(cls, "before_epoch", lambda self, step, encode: seen.append(encode()))
    train(recipe_of("deepcluster", data), tmp_path / "run")
    with beton.open(data / "train.beton") as files:
        assert [(x.shape, x.dtype) for x in seen] == 2 * [((len(files), 64), torch.float32)]
    assert not torch.equal(seen[0], seen[1])


METHOD_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
import torch
from relssl.methods import base, simclr

@dataclass
class Note:
    kinds: ClassVar[tuple] = ()

class Config(base.MethodConfig):
    name: str = "mine"
    kind: Literal["a", "b"] = "a"

class Method(simclr.Method):
    Config = Config
    def __init__(self, make_backbone, config, data):
        super().__init__(make_backbone, simclr.SimCLRConfig(), data)
"""


def recipe_of_file(path: Path, data: Path, *overrides: str) -> Recipe:
    changes = [f"method={{name: {path}}}", *overrides]
    return recipe_of("simclr", data, *changes)


def test_a_method_file_may_say_what_any_module_may(data: Path, tmp_path: Path) -> None:
    """pydantic and dataclasses look up the names in annotations; the class is one, however often it is asked for."""
    path = tmp_path / "mine.py"
    path.write_text(METHOD_FILE)
    assert train(recipe_of_file(path, data), tmp_path / "run") == 0
    assert load_method(str(path)) is load_method(str(path))
    assert recipe_of_file(path, data).method_name == "mine"
    with pytest.raises(ConfigError, match="'c'"):
        recipe_of_file(path, data, "method.kind=c")


def test_a_changed_method_file_is_not_resumed(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METHOD_FILE)
    assert train(recipe_of_file(path, data), tmp_path / "run") == 0
    assert (tmp_path / "run" / "method.py").read_text() == METHOD_FILE
    path.write_text(METHOD_FILE + "# changed\n")
    with pytest.raises(ConfigError, match=r"has changed since .* was started"):
        train(recipe_of_file(path, data), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    VIEWS = None", "VIEWS says which views"),
        ("    Config = dict", r"Config must be a class derived from .*MethodConfig"),
        ("    VIEWS = {'view': 2}", "VIEWS says which views"),
        ("    NEEDS = 'labels'", "NEEDS is a set, such as"),
        ("    forward = base.Method.forward", "Method has no forward"),
        ("    NEEDS = frozenset({'onesize'})", "unknown need: 'onesize'; did you mean 'one_size'"),
        ("    ACCUMULATION = 'maybe'", "unknown kind: 'maybe'"),
    ],
)
def test_a_method_class_that_is_not_whole(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(METHOD_FILE + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_method(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("torch.zeros(4), {}", r"gave \(a tensor of shape \(4,\), \{\}\)"),
        ("torch.zeros(()), {'x': 1.0}", r"gave \(a tensor of shape \(\), \{x: float\}\)"),
        ("torch.zeros(()), {}", "gave a loss without gradient"),
        ("self.head.linear1.bias.sum(), {'lr': torch.zeros(())}", "a metric called 'lr', a name of the trainer's own"),
        ("torch.zeros(())", r"gave a tensor of shape \(\); expected a loss, 0-d, and a dictionary"),
    ],
)
def test_a_forward_that_gives_something_else(data: Path, tmp_path: Path, returned: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(METHOD_FILE + f"    def forward(self, batch, step):\n        return {returned}\n")
    with pytest.raises(RunError, match=message):
        train(recipe_of_file(tmp_path / "mine.py", data), tmp_path / "run")


def test_what_is_evaluated_is_what_the_method_says(any_name: str, data: Path, tmp_path: Path) -> None:
    """The encoder, or ReSA's target: in the saved backbone, and in a checkpoint of a run that has not ended."""
    recipe = recipe_of(any_name, data)
    assert train(recipe, tmp_path / "run") == 0
    wanted = f"{method_class(any_name).EVALUATED}."
    saved = open_weights(tmp_path / "run").backbone.state_dict()
    if not method_class(any_name).TRAINS:
        return
    state = {k.removeprefix(f"model/{wanted}"): v for k, v in final_state(tmp_path / "run").items() if wanted in k}
    assert {k: v for k, v in state.items() if k in saved}.keys() == saved.keys()
    assert_equal_states({k: state[k] for k in saved}, saved)
    (tmp_path / "run" / "backbone.safetensors").unlink()
    assert_equal_states(open_weights(tmp_path / "run").backbone.state_dict(), saved)
