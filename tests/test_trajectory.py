"""Trajectories are stored and come back as they were."""

from pathlib import Path

import pytest
import torch

import noetherflow as nf
from cases import case


def trajectory(*, replicas: int = 3, diverge: bool = False, adamw: bool = False) -> nf.Trajectory:
    one = case("matrix")
    start = {name: tensor.expand(replicas, *tensor.shape).clone() for name, tensor in one.params.items()}
    if diverge:
        start["0.weight"][1] *= 1e6
    return nf.simulate(
        one.model,
        one.loss,
        one.batch,
        nf.AdamW(0.02, batch_size=2) if adamw else nf.SGD(0.02, 2),
        steps=30,
        start=start,
        symmetries=one.symmetries,
        observables={
            "number": lambda params: params["0.weight"].sum(),
            "vector": lambda params: params["0.bias"],
            "single": lambda params: params["0.bias"].float(),
            "count": lambda params: (params["0.bias"] > 0).sum(),
        },
        record=10,
    )


def assert_same(a: nf.Trajectory, b: nf.Trajectory) -> None:
    torch.testing.assert_close(a.steps, b.steps, rtol=0, atol=0)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=0, equal_nan=True)
    for kind in ("charges", "observables", "params", "second_moments"):
        torch.testing.assert_close(getattr(a, kind), getattr(b, kind), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("diverge", [False, True])
def test_what_was_saved_comes_back(tmp_path: Path, suffix: str, replicas: int, diverge: bool) -> None:
    before = trajectory(replicas=replicas, diverge=diverge)
    assert before.diverged.any() == diverge
    path = tmp_path / f"run{suffix}"
    before.save(path)
    assert_same(nf.Trajectory.load(path), before)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_second_moments_come_back(tmp_path: Path, suffix: str) -> None:
    before = trajectory(adamw=True)
    assert before.second_moments.keys() == before.params.keys()
    before.save(tmp_path / f"run{suffix}")
    assert_same(nf.Trajectory.load(tmp_path / f"run{suffix}"), before)


def test_one_tensor_that_is_not_finite_is_enough_to_have_diverged() -> None:
    params = {
        "a": torch.tensor([[1.0], [torch.nan], [2.0]]),
        "b": torch.tensor([[1.0, 2.0], [1.0, 2.0], [torch.inf, 0.0]]),
    }
    found = nf.Trajectory(torch.zeros(1), torch.zeros(1, 3), params=params)
    assert found.diverged.tolist() == [False, True, True]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_bare_trajectory_comes_back(tmp_path: Path, suffix: str) -> None:
    one = case("diagonal")
    before = nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=3)
    before.save(str(tmp_path / f"run{suffix}"))
    assert_same(nf.Trajectory.load(str(tmp_path / f"run{suffix}")), before)


def test_a_table_has_a_row_per_record_and_replica(tmp_path: Path) -> None:
    import pyarrow.parquet

    found = trajectory()
    found.save(tmp_path / "run.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "run.parquet")
    assert table.num_rows == found.loss.numel()
    assert table["replica"].to_pylist()[:4] == [0, 1, 2, 0]
    assert table["loss"].to_pylist() == found.loss.reshape(-1).tolist()
    assert table["charges/rotation"][1].as_py() == found.charges["rotation"][0, 1].reshape(-1).tolist()


@pytest.mark.parametrize("name", ["run", "run.csv"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    found = trajectory()
    with pytest.raises(nf.SettingsError, match=r"npz or \.parquet"):
        found.save(tmp_path / name)
    with pytest.raises(nf.SettingsError, match=r"npz or \.parquet"):
        nf.Trajectory.load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"run{suffix}"
    old = trajectory(replicas=2)
    old.save(path)

    def full(*arguments: object, **more: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("numpy.savez_compressed", full)
    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match="no space"):
        trajectory(replicas=3).save(path)
    assert_same(nf.Trajectory.load(path), old)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
