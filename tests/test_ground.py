"""The ground floor: batches taken apart, files whole or absent, parameters copied."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from noetherflow import ParameterNameError, _batch, _files, _params, _progress, _versions
from noetherflow._model_function import ModelFunction


def test_tensors_come_out_and_go_back_in_the_same_order() -> None:
    batch = {"b": (torch.zeros(2), [torch.ones(3)]), "a": torch.full((1,), 2.0), "text": "kept"}
    tensors = _batch.tensors_of(batch)
    assert [tensor.shape[0] for tensor in tensors] == [2, 3, 1]
    again = _batch.with_tensors(batch, [tensor + 1 for tensor in tensors])
    assert again["text"] == "kept"
    assert torch.equal(again["b"][1][0], torch.full((3,), 2.0))
    assert isinstance(again["b"], tuple)


def test_casting_leaves_whole_numbers_alone() -> None:
    x, y = _batch.cast((torch.zeros(2), torch.zeros(2, dtype=torch.int64)), torch.float64, torch.device("cpu"))
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)


def test_selecting_examples_leaves_shared_tensors_alone() -> None:
    x, shared = _batch.select((torch.arange(4), torch.arange(3)), torch.tensor([1, 3]), 4)
    assert x.tolist() == [1, 3]
    assert shared.tolist() == [0, 1, 2]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    _files.write_json(path, {"x": [1.0, float("nan")], "y": float("inf"), 3: (1,)})
    assert json.loads(path.read_text()) == {"x": [1.0, None], "y": None, "3": [1]}

    def interrupted() -> None:
        with _files.atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(path.read_text())["3"] == [1]
    assert os.listdir(path.parent) == ["result.json"]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    _files.write_json(path, 1)
    with pytest.raises(TypeError):
        _files.write_json(path, {"x": object()})
    assert path.read_text() == "1\n"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_killed_run_leaves_no_half_written_file(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom noetherflow import _files\nwhile True: _files.write_json(sys.argv[1], list(range(200_000)))"
    )
    path = tmp_path / "result.json"
    for pause in (0.0, 0.03, 0.07):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(path.read_text()) == list(range(200_000))
        path.unlink()


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    _files.write_json(tmp_path / "a.json", 1)
    (tmp_path / "b.json").write_text("1")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_a_snapshot_does_not_follow_the_model() -> None:
    layer = nn.Linear(2, 2).double()
    before = _params.snapshot(layer)
    with torch.no_grad():
        layer.weight += 1
    assert not torch.equal(before["weight"], layer.weight)


def test_aliases_lead_to_the_first_name() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    assert _params.aliases(net)["b.weight"] == "a.weight"
    assert _params.aliases(net)["b.bias"] == "b.bias"


def test_the_model_is_a_function_that_leaves_the_module_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    function = ModelFunction(net, lambda model, x: model(x).sum(1))
    before = net[1].running_mean.clone()
    function.losses(function.params, torch.randn(8, 3))
    assert torch.equal(net[1].running_mean, before)
    with pytest.raises(ParameterNameError, match="misspelt"):
        function.losses({"misspelt": torch.zeros(1)}, torch.randn(8, 3))


def test_every_evaluation_of_the_function_begins_with_the_buffers_of_the_model() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.weight * self.calls

    model = Counting()
    function = ModelFunction(model, lambda model, x: model(x).sum(1))
    x = torch.randn(4, 1)
    for _ in range(3):
        assert torch.equal(function.losses(function.params, x), x[:, 0])
        assert torch.equal(function.gradient(function.params, x)[1]["weight"], x.sum().reshape(1))
    assert model.calls == 0


def test_a_module_under_two_names_is_left_alone() -> None:
    """functional_call alone would leave the second value it puts there."""
    shared = nn.Linear(2, 2)
    shared.register_buffer("offset", torch.zeros(2))
    model = nn.Sequential(shared, nn.ReLU(), shared).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    function = ModelFunction(model, lambda model, x: model(x).sum(1), torch.float64)
    params = {name: 3 * tensor for name, tensor in function.params.items()}
    x = torch.randn(4, 2).double()
    moved = function.losses(params, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    torch.testing.assert_close(moved, model(x).sum(1).detach())
    with pytest.raises(ParameterNameError, match=r"2\.weight"):
        function.losses({**params, "2.weight": params["0.weight"]}, x)


def test_only_what_has_a_fraction_is_converted() -> None:
    kinds = {"f": torch.ones(2), "c": torch.ones(2) * 1j, "i": torch.arange(2), "b": torch.tensor([True])}
    copies = _params.snapshot(kinds)
    assert [one.dtype for one in copies.values()] == [torch.float64, torch.complex128, torch.int64, torch.bool]
    assert all(torch.equal(one, copies[name].to(one.dtype)) for name, one in kinds.items())
    assert all(copies[name].data_ptr() != one.data_ptr() for name, one in kinds.items())


def test_progress_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(_progress.track(range(3), "counting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_versions_name_what_numbers_depend_on() -> None:
    assert {"noetherflow", "torch", "python"} <= set(_versions.versions())
