"""Everything that sees the tensors of a model gives the numbers of the CPU on every device, and results on the CPU."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import cases
import noetherflow as nf
import zoo
from device_runs import CPU, FAST, RUNS, SGD, Subject, require_equal
from noetherflow._batch import cast
from noetherflow._device import joined, require_float64
from noetherflow._per_example import own_randomness
from pretended import NAME, WITHOUT_FLOAT64, placed, pretending

RUNS_HERE = RUNS | FAST
FIRST, SECOND = torch.device(NAME, 0), torch.device(NAME, 1)
# Models of the zoo of every kind of operation; `make test-all` has all of them for the noise in one pass.
SHORT = {"convolution, flatten", "attention, rotary", "tied embedding"}
ALSO = {("GPT-2", "detected"), ("graph network", "detected")}
SHORT_CASES = {"diagonal", "matrix", "a tied weight, named by its alias", "dense, eigenvalues 1 and -2"}
IN_ZOO = ("moments", "rates", "detected", "between_microbatches", "in_one_pass", "while_training")
# The pretended device does not have what these need: fused cells of recurrent layers, autocast of its type; and
# complex parameters have no noise.
LEFT_OUT = {"GRU", "LSTM", "autocast to bfloat16", "Fourier neural operator"}


@pytest.fixture(params=["pretended", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device other than the CPU: a pretended device, and a real device where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        yield torch.device("cuda", 0)
        return
    with pretending():
        yield FIRST


def of_case(case: cases.Case) -> Subject:
    return Subject(case.model, case.loss, case.loader(), case.symmetries, case.wrong)


def of_animal(name: str) -> tuple[Subject, float]:
    """A model of the zoo, in float64 unless a part of it is computed in another type; and the rounding."""
    animal = next(animal for animal in zoo.ZOO if animal.name == name)
    model, loss, batch = animal.build()
    if animal.coarse:
        return Subject(model, loss, [batch, batch]), 1e-5
    return Subject(model.double(), loss, [cast(batch, torch.float64, CPU)] * 2), 1e-9


def agree(run: str, subject: Subject, *devices: torch.device, rtol: float = 1e-9) -> None:
    """Raise unless a run on devices has the numbers of the CPU, or is refused by the sentence of the CPU."""
    try:
        expected = RUNS_HERE[run](subject)
    except nf.NoetherflowError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            RUNS_HERE[run](subject.on(*devices))
        return
    require_equal(RUNS_HERE[run](subject.on(*devices)), expected, rtol)


@pytest.mark.parametrize("run", RUNS_HERE)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.name in SHORT_CASES else [pytest.mark.slow]) for case in cases.cases()],
    ids=str,
)
def test_a_case_has_the_numbers_of_the_cpu(case: cases.Case, run: str, device: torch.device) -> None:
    agree(run, of_case(case), device)


@pytest.mark.filterwarnings("ignore:computed in torch.float32")
@pytest.mark.parametrize(
    ("name", "run"),
    [
        pytest.param(
            animal.name, run, marks=[] if animal.name in SHORT or (animal.name, run) in ALSO else pytest.mark.slow
        )
        for animal in zoo.ZOO
        if animal.name not in LEFT_OUT
        for run in IN_ZOO
        if run in FAST or animal.name in SHORT or (animal.name, run) in ALSO
    ],
)
def test_a_model_of_the_zoo_has_the_numbers_of_the_cpu(name: str, run: str, device: torch.device) -> None:
    subject, rtol = of_animal(name)
    agree(run, subject, device, rtol=rtol)


class Stage(nn.Linear):
    """A linear layer that moves its input to its device, whatever parameters a call gives it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.register_buffer("here", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.here.device))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = model(batch[0])
    return (found - batch[1].to(found.device)).square().sum(1)


def spread(kind: str) -> Subject:
    """A model whose symmetries join tensors of two devices."""
    torch.manual_seed(0)
    axis = nf.Axis
    if kind == "matrix":
        model = nn.Sequential(Stage(3, 2), Stage(2, 3))
        into, out = [axis("0.weight", 0), axis("0.bias", 0)], [axis("1.weight", 1)]
        symmetries: dict[str, nf.Symmetry] = {"rotation": nf.MatrixSymmetry(into, out)}
    else:
        model = nn.Sequential(Stage(3, 2, bias=False), nn.ReLU(), Stage(2, 2), nn.ReLU(), Stage(2, 1))
        into, out = [axis("0.weight", 0)], [axis("2.weight", 1)]
        symmetries = {"first": nf.DiagonalSymmetry(into, out)}
        later = [axis("2.weight", 0), axis("2.bias", 0)]
        symmetries["second"] = nf.DiagonalSymmetry(later, [axis("4.weight", 1)])
        if kind == "dense":
            ends = torch.diag(torch.tensor([1.0] * 6 + [-1.0] * 4))
            symmetries = {"dense": nf.DenseSymmetry(ends, ("0.weight", "2.weight"))}
    wrong = {"wrong": nf.ScalarSymmetry([axis("0.weight", 0)], [axis(f"{len(model) - 1}.weight", 0)])}
    outputs = 3 if kind == "matrix" else 1
    batches = [(torch.randn(8, 3).double(), torch.randn(8, outputs).double()) for _ in range(3)]
    return Subject(model.double(), squared_error, batches, symmetries, wrong)


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param((FIRST, SECOND), id="two"),
        pytest.param((FIRST, CPU), id="CPU last"),
        pytest.param((CPU, FIRST), id="CPU first", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("run", [run for run in RUNS if run != "simulated"])
@pytest.mark.parametrize("kind", ["diagonal", "matrix", "dense"])
def test_a_model_on_two_devices_has_the_numbers_of_the_cpu(
    kind: str, run: str, devices: tuple[torch.device, ...]
) -> None:
    with pretending():
        agree(run, spread(kind), *devices)


def test_a_result_that_is_not_on_the_cpu_is_noticed() -> None:
    subject = of_case(cases.case("diagonal"))
    with pytest.raises(AssertionError, match="a result is on"):
        require_equal([torch.ones(2).to(FIRST)], [torch.ones(2)])
    with pytest.raises(AssertionError):
        require_equal(RUNS["moments"](subject.on(CPU)), RUNS["merged"](subject))


def test_moments_are_saved_and_loaded_from_any_device(device: torch.device, tmp_path: object) -> None:
    path = f"{tmp_path}/noise.safetensors"
    noise = of_case(cases.case("diagonal")).on(device).noise(exact=True)
    noise.save(path)
    loaded = nf.NoiseMoments.load(path)
    assert torch.equal(loaded.trace, noise.trace)
    first = nf.drift(loaded, SGD, placed(cases.case("diagonal").model, lambda _: device))
    require_equal(first, nf.drift(noise, SGD, cases.case("diagonal").model))


DOORS: dict[str, Callable[[Subject], object]] = {
    "estimate_noise": lambda s: nf.estimate_noise(s.model, s.loss, s.batches, s.symmetries, progress=False),
    "find_symmetries": lambda s: nf.find_symmetries(s.model, s.loss, s.batches[0]),
    "verify_symmetry": lambda s: nf.verify_symmetry(s.model, s.loss, s.batches[0], (s.symmetries or {})["hidden"]),
    "discover_rescalings": lambda s: nf.discover_rescalings(s.model, s.loss, s.batches[0], progress=False),
    "equilibrate": lambda s: nf.equilibrate(s.model, s.loss, s.batches, SGD, s.symmetries, progress=False),
    "simulate": lambda s: nf.simulate(s.model, s.loss, s.batches[0], SGD, steps=1),
    "NoiseMeter": lambda s: nf.NoiseMeter(s.model, s.along_axes),
    "MicrobatchMeter": lambda s: nf.MicrobatchMeter(s.model, s.along_axes),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_device_without_float64_is_refused_in_a_sentence(door: str) -> None:
    case = cases.case("diagonal")
    case.model.float()
    batches = [cast(batch, torch.float32, CPU) for batch in case.loader()]
    subject = Subject(case.model, case.loss, batches, case.symmetries)
    DOORS[door](subject)
    with pytest.raises(nf.SettingsError, match=r"no float64.*model\.cpu\(\)"):
        DOORS[door](subject.on(WITHOUT_FLOAT64))


def test_devices_with_float64_are_accepted_and_tensors_are_joined() -> None:
    require_float64([CPU, FIRST, SECOND])
    with pytest.raises(nf.SettingsError):
        require_float64([CPU, WITHOUT_FLOAT64])
    with pretending():
        here, there = torch.ones(2).to(FIRST), torch.ones(3).to(SECOND)
        assert [tensor.device for tensor in joined([here, here])] == [FIRST, FIRST]
        assert [tensor.device for tensor in joined(iter([here, there]))] == [CPU, CPU]
    assert joined([]) == []


def test_random_numbers_of_all_devices_are_restored() -> None:
    with pretending():
        torch.manual_seed(1)
        expected = [torch.randn(3, device=device).cpu() for device in (CPU, FIRST, SECOND)]
        torch.manual_seed(1)
        with own_randomness(FIRST, seed=5):
            inside = [torch.randn(3, device=device).cpu() for device in (CPU, FIRST, SECOND)]
        again = [torch.randn(3, device=device).cpu() for device in (CPU, FIRST, SECOND)]
    require_equal(again, expected)
    with pytest.raises(AssertionError):
        require_equal(inside, expected)
