"""Files and optimizers that are not those of Adam or AdamW, or of another model: each is refused in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import noetherflow as nf
from test_second_moments import network, trained

Optimizer = torch.optim.Optimizer
OTHERS: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "without exp_avg_sq"),
    "Adafactor": (
        lambda p: transformers.Adafactor(p, lr=0.01, relative_step=False),
        "'exp_avg_sq_row'.*another optimizer keeps",
    ),
    "Adamax": (lambda p: torch.optim.Adamax(p, lr=0.01), "without exp_avg_sq"),
    "RAdam": (lambda p: torch.optim.RAdam(p, lr=0.01), "which are those of another optimizer"),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=0.01), "'mu_product'.*another optimizer keeps"),
    "AMSGrad": (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), "amsgrad=True divides by the largest v"),
    "maximising": (lambda p: torch.optim.AdamW(p, lr=0.01, maximize=True), "maximize=True follows the gradient up"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_optimizer_is_refused(name: str, tmp_path: Path) -> None:
    make, words = OTHERS[name]
    model = network()
    optimizer = make(model.parameters())
    trained(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for source in (optimizer.state_dict(), tmp_path):
        for read in (nf.second_moments, lambda source, model: nf.AdamW.from_optimizer(source, model=model)):
            with pytest.raises(nf.SettingsError, match=words):
                read(source, model)
    live = words if isinstance(optimizer, torch.optim.Adam) else f"got {name}, whose equilibrium is another"
    with pytest.raises(nf.SettingsError, match=live):
        nf.second_moments(optimizer, model)
    with pytest.raises(nf.SettingsError, match=live):
        nf.AdamW.from_optimizer(optimizer)


def state(steps: int = 2) -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, steps)
    return optimizer.state_dict()


def eight_bits() -> dict[str, Any]:
    """The keys of bitsandbytes."""
    whole = state()
    keys = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    whole["state"] = {i: {"step": 2, **{k: torch.zeros(2, dtype=torch.uint8) for k in keys}} for i in whole["state"]}
    return whole


def without(key: str) -> dict[str, Any]:
    whole = state()
    del whole["state"][0][key]
    return whole


def further() -> dict[str, Any]:
    whole = state()
    whole["state"][0]["exp_avg_slow"] = torch.zeros(3, 4)
    return whole


SOURCES: dict[str, tuple[Callable[[], Any], str]] = {
    "no step": (lambda: state(0), "has taken no step"),
    "bitsandbytes": (eight_bits, "bitsandbytes in 8 bits"),
    "a further average": (further, r"\['exp_avg_slow'\], which another optimizer keeps"),
    "no count": (lambda: without("step"), "incomplete state of parameter 0"),
    "no average": (lambda: without("exp_avg_sq"), "incomplete state of parameter 0"),
    "a checkpoint of a user": (lambda: {"epoch": 3, "optim": state()}, "give its entry 'optim'"),
    "a model": (lambda: network().state_dict(), r"not the state dict of an optimizer.*0\.bias"),
    "a list": (lambda: [1], "expected a torch.optim.AdamW or Adam.*got list"),
    "a schedule": (lambda: None, "got NoneType"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_no_state_of_adam_is_refused(name: str, tmp_path: Path) -> None:
    make, words = SOURCES[name]
    with pytest.raises(nf.SettingsError, match=words):
        nf.second_moments(make(), network())
    torch.save(make(), tmp_path / "optimizer.pt")
    on_disk = words.replace("list", ".*optimizer.pt").replace("NoneType", ".*optimizer.pt")
    with pytest.raises(nf.SettingsError, match=on_disk):
        nf.second_moments(tmp_path, network())
    nf.second_moments(state(), network())  # and what is one is read


class Anything:
    """A class that no file may bring along."""


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "code"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save(state(), path)
    raw = path.read_bytes()
    if damage == "code":
        torch.save(state() | {"extra": Anything()}, path)
    else:
        head = raw[:40] + bytes(200) + raw[240:]
        path.write_bytes({"cut": raw[:-300], "empty": b"", "text": b"lr: 0.1\n", "flipped": head}[damage])
    for source in (path, tmp_path):
        with pytest.raises(nf.FileError) as caught:
            nf.second_moments(source, network())
        assert str(caught.value).startswith(f"{path}: not a file that torch.save wrote")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(nf.FileError, match="there is no such file"):
        nf.second_moments(tmp_path / "nothing.pt", network())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(2, 2)), "4 parameters, the .* 6"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5)), r"parameter 2 .*\(5, 3\).*\(2, 3\)"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), r"parameter 0 .*\(3, 5\).*\(3, 4\)"),
    ],
)
def test_the_state_of_another_model_is_refused(other: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.second_moments(state(), other())
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, 1)
    with pytest.raises(nf.SettingsError, match="holds none of the model's"):
        nf.second_moments(optimizer, other())


def test_a_frozen_part_is_left_out_as_it_was_in_training() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trained(model, optimizer)
    assert list(nf.second_moments(optimizer.state_dict(), model).values) == ["2.weight", "2.bias"]
    with pytest.raises(nf.SettingsError, match="freeze the parameters that the optimizer does not train"):
        nf.second_moments(optimizer.state_dict(), network())
    # An optimizer of all parameters, of which a part was frozen.
    every = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, every)
    moments = nf.second_moments(every.state_dict(), model)
    assert (list(moments.values), moments.without) == (["2.weight", "2.bias"], ("0.weight", "0.bias"))
