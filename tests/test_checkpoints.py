"""Checkpoints on disk: names from shapes, learning rates after a schedule, and no data needed."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noetherflow as nf
from hugging_face import next_token
from noetherflow.optimizers.naming import names_by_shape
from same import require_same
from test_second_moments import MAKERS, by_dimension, hidden, network, trained

# A folder that transformers.Trainer wrote.

STEPS, TOKENS = 6, 17
SIZES = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **SMALL, num_attention_heads=4, num_key_value_heads=2)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer after its last step, with weight decay in one of two groups and a schedule that ends at 0."""
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(3, TOKENS, (64, 6))
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=8, weight_decay=0.1,
            learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = transformers.Trainer(model=MODELS[request.param](), args=arguments, train_dataset=data)
        trainer.train()
    return trainer


def checkpoint_of(trainer: Any) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{STEPS}"


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_hugging_face_is_analysed_without_data(run: Any) -> None:
    """From the folder alone: names from shapes, and every scaling at rest."""
    folder = checkpoint_of(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(3, 15).reshape(2, 6)  # no data: any tokens show the graph
    symmetries = nf.find_symmetries(model, next_token, tokens)
    moments = nf.second_moments(folder, model, symmetries)
    adamw = nf.AdamW.from_optimizer(folder, model=model)
    # The names are those of the optimizer that is still in memory.
    live = nf.second_moments(run.optimizer.optimizer, run.model, symmetries)
    require_same({name: moments.values[name] for name in live.values}, live.values)
    decayed = set(run.get_decay_parameter_names(run.model))
    assert {name: adamw.decay_of(name) for name in moments.values} == {
        name: 0.1 if name in decayed else 0.0 for name in moments.values
    }
    assert adamw.lr == 1e-3
    assert adamw.decoupled
    equilibrium = nf.solve_equilibrium(moments, adamw, model)
    scalings = [name for name, s in symmetries.items() if s.action is nf.Action.SCALES_ENTRIES]
    assert len(scalings) >= 4
    assert {equilibrium.outcomes[name].status for name in scalings} == {nf.Status.CONVERGED}
    others = {equilibrium.outcomes[name].status for name in symmetries if name not in scalings}
    assert others == {nf.Status.NO_CHARGE}
    drift = nf.drift(moments, adamw, model)
    for name in scalings:
        assert equilibrium.drift[name].abs().max() < 1e-9 * drift[name].abs().max()
        assert equilibrium.imbalance[name].before > 1e-3
    # The twin: names in the order of the model instead are those of other tensors.
    with pytest.raises(nf.SettingsError, match="does not belong to this model"):
        nf.second_moments(folder, model, names=[name for name, _ in model.named_parameters()])


def test_a_folder_without_the_state_of_an_optimizer(run: Any, tmp_path: Path) -> None:
    with pytest.raises(nf.FileError, match=rf"no file optimizer.pt or optimizer.bin: give .*checkpoint-{STEPS}"):
        nf.second_moments(run.args.output_dir, network())
    with pytest.raises(nf.FileError, match="save_only_model"):
        nf.AdamW.from_optimizer(tmp_path)


# Names from shapes.


class Shapes(nn.Module):
    """A model with parameters of given shapes, named 0, 1, ..."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape)))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_names_are_recovered_where_a_single_interleaving_has_the_shapes(data: st.DataObject) -> None:
    """Against all assignments of parameters to groups, tried one after the other."""
    count = data.draw(st.integers(1, 6))
    shapes = data.draw(st.lists(st.sampled_from([(2,), (3,), (2, 2)]), min_size=count, max_size=count))
    size = data.draw(st.integers(1, 3))
    truth = data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    known = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))

    def grouped(choice: tuple[int, ...] | list[int], values: list[Any]) -> list[list[Any]]:
        return [[value for value, k in zip(values, choice, strict=True) if k == group] for group in range(size)]

    held = [torch.Size(shape) if there else None for shape, there in zip(shapes, known, strict=True)]
    groups = grouped(truth, held)

    def fits(choice: tuple[int, ...]) -> bool:
        sides = zip(grouped(choice, shapes), groups, strict=True)
        return all(
            len(mine) == len(theirs)
            and all(other in (None, torch.Size(shape)) for shape, other in zip(mine, theirs, strict=True))
            for mine, theirs in sides
        )

    ways = [choice for choice in itertools.product(range(size), repeat=count) if fits(choice)]
    names, model = [f"p{index}" for index in range(count)], Shapes(shapes)
    # Weight decays to which no recipe applies.
    if len(ways) == 1:
        assert names_by_shape(groups, [0.3, 0.2, 0.1][:size], model) == grouped(truth, names)
    else:
        with pytest.raises(nf.SettingsError, match=r"several ways.*give names="):
            names_by_shape(groups, [0.3, 0.2, 0.1][:size], model)


def sizes(*shapes: tuple[int, ...]) -> list[torch.Size | None]:
    return [torch.Size(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("decays", "expected"),
    [((0.1, 0.0), "first"), ((0.0, 0.1), "second"), ((0.0, 0.0), "first"), ((0.1, 0.2), None), ((0.2, 0.1), None)],
)
def test_a_recipe_decides_where_shapes_do_not(decays: tuple[float, float], expected: str | None) -> None:
    """Four vectors of a shape, of which a norm and a bias have no decay and a gain has."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), Shapes([(2,)]), nn.Linear(2, 2, bias=False))
    decayed, rest = ["0.weight", "2.p0", "3.weight"], ["0.bias", "1.weight", "1.bias"]
    groups = [sizes((2, 2), (2,), (2, 2)), sizes((2,), (2,), (2,))]
    listed = [decayed, rest]
    if expected == "second":
        groups, listed = groups[::-1], listed[::-1]
    if expected is None:
        with pytest.raises(nf.SettingsError, match="none of the usual recipes"):
            names_by_shape(groups, decays, model)
    else:
        assert names_by_shape(groups, decays, model) == listed


def test_two_recipes_that_disagree_are_not_chosen_between() -> None:
    """Matrices named as biases: by dimension they decay, by name the vectors do."""
    model = nn.Module()
    for name, shape in (("bias_a", (2, 2)), ("u", (2, 2)), ("bias_b", (2,)), ("v", (2,))):
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    groups = [[None, None], [None, None]]
    with pytest.raises(nf.SettingsError, match="several of the usual recipes"):
        names_by_shape(groups, (0.1, 0.0), model)


def test_an_ambiguous_order_is_asked_for() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4))).double()
    weights = [*model.parameters()]
    groups = [{"params": weights[::2], "weight_decay": 0.1}, {"params": weights[1::2], "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model(torch.randn(5, 3).double()).square().mean().backward()
    optimizer.step()
    with pytest.raises(nf.SettingsError, match=r"groups of \[2, 2\] parameters.*several ways.*give names="):
        nf.second_moments(optimizer.state_dict(), model)
    order = ["0.weight", "2.weight", "1.weight", "3.weight"]
    moments = nf.second_moments(optimizer.state_dict(), model, names=order)
    live = nf.second_moments(optimizer, model)
    require_same({name: moments.values[name] for name in live.values}, live.values)
    adamw = nf.AdamW.from_optimizer(optimizer.state_dict(), model=model, names=order)
    assert adamw.weight_decay == dict(zip(order, (0.1, 0.1, 0.2, 0.2), strict=True))
    for wrong, words in ((order[:3], "names must be 4"), ([*order[:3], "0.weight"], "twice"), ("abcd", "4 names")):
        with pytest.raises(nf.SettingsError, match=words):
            nf.second_moments(optimizer.state_dict(), model, names=wrong)
    with pytest.raises(nf.ParameterNameError, match=r"9\.weight"):
        nf.second_moments(optimizer.state_dict(), model, names=[*order[:3], "9.weight"])
    with pytest.raises(nf.SettingsError, match="names= is for state dicts"):
        nf.second_moments(optimizer, model, names=order)


# Settings from a file.


@pytest.mark.parametrize("maker", MAKERS)
def test_the_settings_on_disk_are_those_of_the_optimizer(maker: str, tmp_path: Path) -> None:
    model = network()
    optimizer = MAKERS[maker](model)
    trained(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = nf.AdamW.from_optimizer(optimizer, model=model, batch_size=8)
    for source in (optimizer.state_dict(), tmp_path / "optimizer.pt", tmp_path):
        assert nf.AdamW.from_optimizer(source, model=copy.deepcopy(model), batch_size=8) == live
    if maker == "two groups":
        assert live.decay_of("0.weight") == 0.1 != live.decay_of("0.bias")
        assert live.betas_of("0.weight") == (0.8, 0.95) != live.betas_of("0.bias")
        with pytest.raises(nf.SettingsError, match="model=model"):
            nf.AdamW.from_optimizer(tmp_path, batch_size=8)
    else:
        assert nf.AdamW.from_optimizer(tmp_path, batch_size=8) == live


def test_a_schedule_that_ended_at_zero() -> None:
    model = network()
    optimizer = torch.optim.AdamW(by_dimension(model, lr=0.02), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    trained(model, optimizer, 2)
    for _ in range(2):
        schedule.step()
    for source in (optimizer, optimizer.state_dict()):  # on the way, the present learning rate counts
        assert nf.AdamW.from_optimizer(source, model=model).lr_of("0.weight") == pytest.approx(0.01)
    for _ in range(2):
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    for source in (optimizer, optimizer.state_dict()):
        adamw = nf.AdamW.from_optimizer(source, model=model)
        assert (adamw.lr_of("0.weight"), adamw.lr_of("0.bias")) == (0.02, 0.01)
    for group in optimizer.param_groups:
        del group["initial_lr"]
    for source in (optimizer, optimizer.state_dict()):
        with pytest.raises(nf.SettingsError, match=r"learning rate of a parameter group is 0.*give lr="):
            nf.AdamW.from_optimizer(source, model=model)
        assert nf.AdamW.from_optimizer(source, model=model, lr=0.3).lr == 0.3


def test_a_state_dict_that_does_not_say_whether_its_decay_is_decoupled(tmp_path: Path) -> None:
    """As from PyTorch before 2.7."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    trained(model, optimizer, 1)
    old = optimizer.state_dict()
    del old["param_groups"][0]["decoupled_weight_decay"]
    with pytest.raises(nf.SettingsError, match="decoupled=True for AdamW"):
        nf.AdamW.from_optimizer(old)
    assert [nf.AdamW.from_optimizer(old, decoupled=kind).decoupled for kind in (True, False)] == [True, False]
    torch.save(old, tmp_path / "optimizer.pt")
    assert nf.AdamW.from_optimizer(tmp_path).decoupled  # transformers.Trainer has AdamW, and no Adam
    coupled = torch.optim.Adam(network().parameters(), weight_decay=0.1)
    assert not nf.AdamW.from_optimizer(coupled.state_dict()).decoupled
    assert dataclasses.replace(nf.AdamW.from_optimizer(coupled), decoupled=True).decoupled
    nf.second_moments(old, model, hidden())
