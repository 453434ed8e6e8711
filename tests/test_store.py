"""Results as files and pickles: equal to the last bit, also across processes; a file is written completely or not."""

import copy
import dataclasses
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

import checks
import measures_halves
import noetherflow as nf
import stored
from cases import Case, case, cases
from noetherflow import _store
from same import bits, differences, require_same
from stored import results_of
from toy_symmetry import toy_of

TESTS = Path(__file__).parent


class Toy(toy_of()):
    """A symmetry that a user wrote and imported."""


class Pair(NamedTuple):
    """Two tensors."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True)
class Everything:
    """Every kind of field that a file can hold."""

    numbers: tuple[float, ...]
    fixed: tuple[int, str, bool]
    names: list[str]
    tensors: dict[str, Tensor]
    pairs: dict[str, Pair]
    status: nf.Status
    missing: tuple[int, int, int] | None
    residual: nf.Residual
    symmetry: nf.Symmetry


def everything() -> Everything:
    """Floats, tensors and names that are easily lost on the way."""
    quiet, loud = (struct.unpack(">d", bytes.fromhex(text))[0] for text in ("7ff8000000000000", "fff80000deadbeef"))
    storage = torch.arange(12.0, dtype=torch.float64)
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1], dtype=torch.float64)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    return Everything(
        numbers=(0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf, quiet, loud, 2, 1 / 3),
        fixed=(-(2**70), "a\nb\u2028\ud800\x00\"'\\", True),
        names=["", "漢字", "</script>"],
        tensors={
            "odd": odd,
            "scalar": torch.tensor(0.1, dtype=torch.float64),
            "empty": torch.empty(0, 3),
            "empty too": torch.empty(0, 3),
            "view": storage[3:7],
            "overlapping view": storage[5:9],
            "transposed": storage.reshape(3, 4).mT,
            "expanded": torch.tensor([1.5]).expand(4, 3),
            "same": odd,
            "learnt": torch.nn.Parameter(torch.ones(2)).detach(),
            "conjugate": torch.tensor([1 + 2j]).conj(),
            "a\ud800 b/\n漢": torch.ones(1),
        }
        | {str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in dtypes},
        pairs={"p": Pair(torch.ones(2), torch.zeros(()))},
        status=nf.Status.AT_INFINITY,
        missing=None,
        residual=nf.Residual(1e-16, math.nan, 3, torch.bfloat16),
        symmetry=Toy("weight", 0.1),
    )


@pytest.fixture
def explanation() -> nf.Explanation:
    return stored.explanation()


@pytest.fixture
def noise() -> nf.NoiseMoments:
    return stored.noise()


# Equal to the last bit.


@pytest.mark.parametrize("one", cases(), ids=str)
def test_results_are_the_same_after_a_file_and_after_a_pickle(one: Case, tmp_path: Path) -> None:
    for result in results_of(one):
        path = tmp_path / "deep" / f"{type(result).__name__}.safetensors"
        result.save(path)
        require_same(type(result).load(path), result)
        require_same(pickle.loads(pickle.dumps(result)), result)
        require_same(copy.deepcopy(result), result)
        assert [entry.name for entry in path.parent.glob(f"*{path.stem}*")] == [path.name]


def test_an_explanation_is_the_same_after_a_file_and_after_a_pickle(
    explanation: nf.Explanation, tmp_path: Path
) -> None:
    explanation.save(tmp_path / "e.safetensors")
    loaded = nf.Explanation.load(tmp_path / "e.safetensors")
    require_same(loaded, explanation)
    require_same(pickle.loads(pickle.dumps(explanation)), explanation)
    finding = loaded.rejected[0]
    assert (finding.residual.loss, finding.residual.gradient, finding.residual.example) == (0.5, math.inf, 7)
    assert finding.symmetry == explanation.found[0].symmetry
    assert loaded.axes == explanation.axes
    assert str(loaded) == str(explanation)


def test_generators_off_axes_are_the_same_after_a_file(explanation: nf.Explanation, tmp_path: Path) -> None:
    generator = nf.DenseSymmetry(torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.float64), ("u", "v"))
    kept = dataclasses.replace(explanation, off_axis=(generator,), off_axis_note="a note")
    kept.save(tmp_path / "e.safetensors")
    loaded = nf.Explanation.load(tmp_path / "e.safetensors")
    require_same(loaded, kept)
    assert loaded.off_axis[0].names == ("u", "v")
    assert torch.equal(loaded.off_axis[0].generator, generator.generator)
    assert loaded.off_axis_note == "a note"
    assert "1  mixes entries  u, v" in str(loaded)


def test_what_did_not_end_well_is_the_same_after_a_file(tmp_path: Path) -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[1] = 0.0
        one.model[0].bias[1] = -1.0
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries, progress=False)
    assert analysis.equilibrium.relaxation_steps["hidden"][1] == math.inf
    analysis.save(tmp_path / "a.safetensors")
    loaded = nf.Analysis.load(tmp_path / "a.safetensors")
    require_same(loaded, analysis)
    assert loaded.equilibrium.outcomes["hidden"].directions == (1,)


def test_weight_decay_by_parameter_is_the_same_after_a_file_and_after_a_pickle(tmp_path: Path) -> None:
    one = case("diagonal")
    optimizer = torch.optim.SGD(checks.groups_of(one.model, one.decays), lr=0.1)
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=5)
    analysis = nf.analyze(one.model, one.loss, one.loader(), sgd, one.symmetries, progress=False)
    assert analysis.settings.weight_decay == one.decays
    analysis.save(tmp_path / "a.safetensors")
    for again in (nf.Analysis.load(tmp_path / "a.safetensors"), pickle.loads(pickle.dumps(analysis))):
        require_same(again, analysis)
        assert again.settings == nf.SGD(0.1, 5, one.decays)
    settings = json.loads(json.dumps(analysis.to_json()))["settings"]
    assert settings["weight_decay"] == one.decays
    assert settings["gamma"] == {name: decay / 2 for name, decay in one.decays.items()}


def test_every_kind_of_field_is_the_same_after_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    _store.save(everything(), path)
    loaded = _store.load(Everything, path)
    require_same(loaded, everything())
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in loaded.tensors.items()}
    assert sizes == {name: tensor.nbytes for name, tensor in loaded.tensors.items()}  # not views of the file


CHANGES: dict[str, Callable[[Everything], Everything]] = {
    "a float by a bit": lambda e: dataclasses.replace(e, numbers=(math.nextafter(0.1, 1), *e.numbers[1:])),
    "the sign of zero": lambda e: dataclasses.replace(e, numbers=(0.1, 0.0, *e.numbers[2:])),
    "the payload of NaN": lambda e: dataclasses.replace(e, numbers=(*e.numbers[:7], math.nan, *e.numbers[8:])),
    "an int for a float": lambda e: dataclasses.replace(e, numbers=(*e.numbers[:8], 2.0, *e.numbers[9:])),
    "a tensor by a bit": lambda e: dataclasses.replace(
        e, tensors=e.tensors | {"scalar": torch.tensor(math.nextafter(0.1, 1), dtype=torch.float64)}
    ),
    "a dtype": lambda e: dataclasses.replace(e, tensors=e.tensors | {"scalar": e.tensors["scalar"].float()}),
    "a shape": lambda e: dataclasses.replace(e, tensors=e.tensors | {"scalar": e.tensors["scalar"][None]}),
    "an order": lambda e: dataclasses.replace(e, tensors=dict(reversed(e.tensors.items()))),
    "a list for a tuple": lambda e: dataclasses.replace(e, fixed=list(e.fixed)),
    "a status": lambda e: dataclasses.replace(e, status=nf.Status.CONVERGED),
    "the example of a residual": lambda e: dataclasses.replace(
        e, residual=nf.Residual(1e-16, math.nan, 4, torch.bfloat16)
    ),
    "the precision of a residual": lambda e: dataclasses.replace(e, residual=nf.Residual(1e-16, math.nan, 3)),
    "an attribute of a symmetry": lambda e: dataclasses.replace(e, symmetry=Toy("weight", 0.2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_single_field_is_seen(change: str) -> None:
    assert len(list(differences(CHANGES[change](everything()), everything()))) >= 1


def test_tensors_of_another_device_would_be_on_the_cpu(tmp_path: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _store.save(Pair(torch.ones(2, device=device), torch.zeros((), device=device)), tmp_path / "p")
    require_same(_store.load(Pair, tmp_path / "p"), Pair(torch.ones(2), torch.zeros(())))


def test_a_loaded_result_does_not_depend_on_its_file(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    noise.save(path)
    loaded = nf.NoiseMoments.load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    require_same(loaded, noise)


def test_other_programs_can_read_the_numbers(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    noise.save(tmp_path / "n.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "n.safetensors")
    (key,) = (key for key in tensors if key.endswith("NoiseMoments.mean['0.weight']"))
    assert torch.equal(tensors[key], noise.mean["0.weight"])


def test_moments_hold_neither_a_loss_nor_a_batch(noise: nf.NoiseMoments) -> None:
    assert not vars(noise).keys() & {"witness", "loss", "batch"}


# Across processes.


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that two other processes left, each of its half of the data."""
    folder = tmp_path_factory.mktemp("halves")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    script = str(TESTS / "measures_halves.py")
    for half in (0, 1):
        done = subprocess.run(
            [sys.executable, script, str(half), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("index", "one"), list(enumerate(cases())), ids=str)
def test_merging_across_processes_is_merging_in_one_process(index: int, one: Case, halves: Path) -> None:
    here = [measures_halves.measure(one, half) for half in (0, 1)]
    assert here[0].count + here[1].count == len(one.batch[1])
    expected = here[0].merge(here[1])
    loaded = [nf.NoiseMoments.load(halves / f"{index}-{half}.safetensors") for half in (0, 1)]
    require_same(loaded[0].merge(loaded[1]), expected)
    unpickled = [pickle.loads((halves / f"{index}-{half}.pickle").read_bytes()) for half in (0, 1)]
    require_same(unpickled[0].merge(unpickled[1]), expected)
    # The halves differ, and the order of a merge is seen in the last bits: the comparison could have failed.
    assert list(differences(loaded[1].merge(loaded[1]), expected))
    everything_at_once = nf.estimate_noise(one.model, one.loss, [one.batch], one.symmetries, progress=False)
    torch.testing.assert_close(expected.trace, everything_at_once.trace, rtol=1e-10, atol=0)


def test_moments_of_the_same_half_merged_in_memory_and_from_files_would_differ_from_other_moments(
    halves: Path,
) -> None:
    first, second = (nf.NoiseMoments.load(halves / f"{index}-0.safetensors") for index in (2, 3))
    with pytest.raises(nf.ParameterNameError):
        first.merge(second)


def test_a_symmetry_of_a_script_is_loaded_where_the_script_is_imported(halves: Path) -> None:
    path = halves / "scripted-0.safetensors"
    assert b'"class\\": \\"Scripted\\", \\"package\\": \\"__main__\\"' in path.read_bytes()
    loaded = nf.NoiseMoments.load(path)
    assert type(loaded.symmetries["mine"]) is measures_halves.Scripted
    assert loaded.symmetries["mine"] == measures_halves.Scripted("0.weight", 0.1)
    code = f"import noetherflow as nf\ntry: nf.NoiseMoments.load({str(path)!r})\nexcept nf.FileError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'Scripted', which is not an imported Symmetry: import the module" in done.stdout


# What cannot be written.


class Silent(toy_of()):
    """A symmetry whose constructor's argument is not kept."""

    def __init__(self, tensor: str, seed: int) -> None:
        self.tensor = tensor + str(seed)


class Vague(toy_of()):
    """A symmetry whose constructor says nothing of its argument."""

    def __init__(self, tensor, strength) -> None:
        self.tensor, self.strength = tensor, strength


@dataclasses.dataclass
class Holder:
    """A field of any type."""

    field: Any


def saved(result: object, path: Path, words: str) -> None:
    path.write_text("before")
    with pytest.raises(nf.FileError) as caught:
        _store.save(result, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_text() == "before"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (dataclasses.replace(everything(), symmetry=Silent("w", 1)), "no attribute 'seed'"),
        (dataclasses.replace(everything(), symmetry=Vague("w", 1)), "needs an annotation"),
        (dataclasses.replace(everything(), symmetry=3), "expected a Symmetry, got 3"),
        (dataclasses.replace(everything(), status="converged"), "expected a member of Status"),
        (dataclasses.replace(everything(), fixed=(1, "a")), "a sequence of length 3"),
        (dataclasses.replace(everything(), numbers=("a",)), "expected a number, got 'a'"),
        (dataclasses.replace(everything(), tensors={1: torch.ones(1)}), "a mapping from names"),
        (dataclasses.replace(everything(), tensors={"a": 1.0}), "expected a tensor"),
        (dataclasses.replace(everything(), tensors={"a": torch.eye(2).to_sparse()}), "expected a dense tensor"),
        (dataclasses.replace(everything(), tensors={"a": torch.ones(1, dtype=torch.complex128)}), "complex128"),
        (dataclasses.replace(everything(), tensors={"a": torch.ones(1, device="meta")}), "meta"),
        (dataclasses.replace(everything(), pairs={"a": (torch.ones(1), torch.ones(1))}), "the type Pair"),
        (Holder(print), "no file can hold"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_the_old_file_stays(result: object, words: str, tmp_path: Path) -> None:
    saved(result, tmp_path / "x", words)


def test_a_place_that_cannot_be_written_is_refused(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "file" / "n.safetensors", tmp_path / "folder", "a\0b"):
        with pytest.raises(nf.FileError, match="cannot be saved"):
            noise.save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full"), MemoryError])
def test_an_interrupted_write_leaves_the_old_file(
    interruption: Any, noise: nf.NoiseMoments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "n.safetensors"
    noise.save(path)
    half = dataclasses.replace(noise, count=12)

    def stops(tensors: Any, temporary: Path, metadata: Any) -> None:
        Path(temporary).write_bytes(b"half of the new file")
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr(_store, "save_file", stops)
        with pytest.raises((KeyboardInterrupt, nf.FileError, MemoryError)):
            half.save(path)
    require_same(nf.NoiseMoments.load(path), noise)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    half.save(path)  # without the interruption it is the new file
    require_same(nf.NoiseMoments.load(path), half)


def test_a_class_defined_again_replaces_its_predecessor(tmp_path: Path) -> None:
    """As in a notebook whose cell runs twice."""

    def define() -> Any:
        return type("Again", (toy_of(),), {"__module__": "__main__"})

    first = define()
    _store.save(dataclasses.replace(everything(), symmetry=first("w", 0.5)), tmp_path / "x")
    assert type(_store.load(Everything, tmp_path / "x").symmetry) is first
    second = define()
    assert type(_store.load(Everything, tmp_path / "x").symmetry) is second


def test_a_class_of_a_user_is_never_taken_for_a_class_of_ours(tmp_path: Path) -> None:
    namesake = type("ScalarSymmetry", (toy_of(),), {"__module__": "elsewhere.symmetries"})
    for symmetry in (namesake("w", 0.5), nf.ScalarSymmetry(plus=nf.Axis("w", 0))):
        _store.save(dataclasses.replace(everything(), symmetry=symmetry), tmp_path / "x")
        assert type(_store.load(Everything, tmp_path / "x").symmetry) is type(symmetry)


def test_nothing_is_unpickled_and_no_code_runs() -> None:
    for name in ("_store.py", "_codec.py"):
        source = (Path(_store.__file__).parent / name).read_text("utf-8")
        for word in ("import pickle", "torch.load", "eval(", "exec(", "import_module", "__import__"):
            assert word not in source


def test_bits_are_compared_as_bytes() -> None:
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))
    assert bits(torch.tensor([1.0], dtype=torch.float64)) == struct.pack("<d", 1.0)
