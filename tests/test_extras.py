"""The package with its four dependencies alone: the same numbers, and a sentence for what is missing; clean imports."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import noetherflow as nf
from noetherflow import _extras
from noetherflow.noise.kernels.choose import has_numba
from test_cli import BUILD

ROOT = Path(__file__).parents[1]
CORE = ("torch", "numpy", "scipy", "safetensors")

# Everything that a fresh interpreter can be asked about and that another program in the process would notice.
STATE = """
import decimal, gc, importlib, json, locale, logging, os, pkgutil, random, signal, sys, warnings
import multiprocessing, threading
import matplotlib, numpy, torch


def digest(thing):
    return hash(repr(thing))


def state():
    root = logging.getLogger()
    return {
        "matplotlib.rcParams": {name: repr(value) for name, value in matplotlib.rcParams.items()},
        "matplotlib backend": matplotlib.get_backend(auto_select=False),
        "warnings.filters": [repr(one) for one in warnings.filters],
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "threads between operations": torch.get_num_interop_threads(),
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "denormal numbers": float(torch.tensor([1e-42], dtype=torch.float32) * 1),
        "torch's print options": repr(vars(torch._tensor_str.PRINT_OPTS)),
        "torch's random state": digest(torch.get_rng_state().tolist()),
        "numpy's random state": digest(numpy.random.get_state()[1].tolist()),
        "numpy's errors": numpy.geterr(),
        "numpy's print options": repr(numpy.get_printoptions()),
        "random state": digest(random.getstate()),
        "logging": [root.level, repr(root.handlers), logging.root.manager.disable, repr(logging.getLoggerClass())],
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "hooks": [repr(one) for one in (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)],
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()],
        "start of processes": multiprocessing.get_start_method(allow_none=True),
        "signals": [repr(signal.getsignal(one)) for one in signal.valid_signals()],
        "streams": [repr(one) for one in (sys.stdin, sys.stdout, sys.stderr)],
        "decimal numbers": repr(decimal.getcontext()),
    }


# What these change when they are imported is their affair.
for name in ("numba", "plotly.offline", "pyarrow.parquet", "rich.progress", "scipy.optimize", "scipy.linalg", "typer",
             "safetensors.torch", "torch.fx", "matplotlib.figure", "concurrent.futures.process", "lightning.pytorch",
             "transformers.trainer"):
    importlib.import_module(name)
changed = []
for step in STEPS:
    before = state()
    exec(step)
    after = state()
    changed.append([name for name in before if before[name] != after[name]])
print(json.dumps(changed))
"""
EVERY_MODULE = """
import noetherflow
names = [one.name for one in pkgutil.walk_packages(noetherflow.__path__, "noetherflow.", onerror=print)]
for name in names:
    importlib.import_module(name)
assert len(names) > 90, names
"""

# From a model to a model at rest, with every step in between.
PATH = """
import torch, noetherflow as nf
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
batches = [(torch.randn(16, 4).double(), torch.randn(16, 3).double()) for _ in range(3)]
loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
sgd = nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3)
found = nf.find_symmetries(net, loss, batches[0])
noise = nf.estimate_noise(net, loss, batches, found)
rates = nf.drift(noise, sgd, net)
equilibrium = nf.solve_equilibrium(noise, sgd, net)
meter = nf.NoiseMeter(net, found)
with meter.step(batches[0]):
    loss(net, batches[0]).mean().backward()
analysis = nf.analyze(net, loss, batches, sgd)
nf.rebalance_(net, equilibrium, loss, batches[0])
numbers = [
    *(rate.tolist() for rate in rates.values()),
    *(noise.grams[name].plus.tolist() + noise.grams[name].minus.tolist() for name in found),
    *(parameter.flatten().tolist() for parameter in net.parameters()),
    [analysis.reports[0].noise_plus, analysis.reports[0].noise_minus, equilibrium.trace_after],
]
"""
# Operations with compiled loops of their own, in the precision for which there are most of them.
FAST = """
from torch import nn
torch.manual_seed(0)
image = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
text = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 600), nn.ReLU(), nn.Linear(600, 8, bias=False))
square = lambda model, batch: model(batch).square().flatten(1).mean(1)
rough = []
for model, batch in ((image, torch.randn(6, 2, 6, 6)), (text, torch.randint(9, (20, 7)))):
    meter = nf.NoiseMeter(model, nf.find_symmetries(model, square, batch))
    with meter.step(batch):
        square(model, batch).mean().backward()
    moments = meter.noise
    rough += [[moments.trace.item()], *(side.flatten().tolist() for name in moments.grams
              for side in (moments.grams[name].plus, moments.grams[name].minus))]
"""


def alone(code: str, *, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter in which some packages cannot be imported."""
    hide = f"import sys\nfor name in {without!r}:\n    sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


def needed_by(*names: str) -> set[str]:
    """These distributions and all that they depend on, extras of theirs apart."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        parsed = [Requirement(one) for one in wanted]
        waiting += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def packages_beside(*names: str) -> tuple[str, ...]:
    """Everything that can be imported here and is neither Python's, nor ours, nor brought by these distributions."""
    kept = needed_by(*names) | {"noetherflow"}
    return tuple(
        sorted(
            module
            for module, owners in importlib.metadata.packages_distributions().items()
            if not {owner.lower().replace("_", "-") for owner in owners} & kept and module.isidentifier()
        )
    )


OTHERS = packages_beside(*CORE)


def test_what_is_hidden_is_what_the_extras_bring_and_more() -> None:
    assert {"numba", "llvmlite", "rich", "typer", "matplotlib", "pyarrow", "plotly", "transformers"} <= set(OTHERS)
    assert not {"torch", "numpy", "scipy", "safetensors", "sympy", "noetherflow"} & set(OTHERS)


def test_the_path_from_a_model_to_its_equilibrium_needs_four_packages_and_gives_the_same_numbers() -> None:
    # Its last line tries what would have ended the program had it been on the path.
    code = f"{PATH}{FAST}import json\nprint(json.dumps([numbers, rough]))\nimport rich"
    done = alone(code, without=OTHERS)
    assert done.stderr.splitlines()[-1:] == ["ModuleNotFoundError: import of rich halted; None in sys.modules"]
    assert done.stderr.count("Error") == 1
    here: dict[str, list[list[float]]] = {}
    exec(PATH + FAST, here)
    assert has_numba()
    for name, found, close in zip(("numbers", "rough"), json.loads(done.stdout), (1e-11, 2e-4), strict=True):
        expected = [number for row in here[name] for number in row]
        assert len(expected) > 40
        assert [number for row in found for number in row] == pytest.approx(expected, rel=close, abs=1e-2 * close)


def test_the_dependencies_are_those_four() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {Requirement(one).name for one in project["dependencies"]} == set(CORE)
    assert {"cpu", "cli", "report", "paper", "all"} <= set(project["optional-dependencies"])


SENTENCES = {
    "report": "from noetherflow.report import figure\nfigure.draw(None)",
    "paper": "import noetherflow.paper.experiment",
    "lightning": "import noetherflow.integrations.lightning",
    "transformers": "import noetherflow.integrations.transformers",
    "paper to write": "import torch, noetherflow as nf\n"
    "nf.Trajectory(torch.arange(2), torch.zeros(2, 1)).save('never.parquet')",
    "paper to read": "import noetherflow as nf\nnf.Trajectory.load('never.parquet')",
}


def test_what_is_missing_is_named_with_what_installs_it() -> None:
    code = f"""
import json, noetherflow as nf
said = {{}}
for what, code in {SENTENCES!r}.items():
    try:
        exec(code)
    except nf.MissingExtraError as error:
        assert isinstance(error, nf.NoetherflowError) and isinstance(error, ImportError)
        said[what] = str(error)
print(json.dumps(said))
"""
    done = alone(code, without=OTHERS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == set(SENTENCES)
    for what, sentence in said.items():
        assert re.fullmatch(
            rf'.+ needs .+, which (is|are) not installed: run pip install "noetherflow\[{what.split()[0]}\]"', sentence
        )


def test_the_command_line_without_its_packages_is_one_sentence_and_exit_code_2() -> None:
    done = alone("from noetherflow.__main__ import main\nmain()", without=OTHERS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'the command line needs typer and rich, which are not installed: run pip install "noetherflow[cli]"\n'
    )


def test_the_command_line_alone_draws_nothing_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BUILD.format(neighbour=""))
    code = f"""
import json
from typer.testing import CliRunner
from noetherflow._cli import app
file, out = {str(tmp_path / "mine.py")!r}, {str(tmp_path / "out")!r}
commands = (["symmetries", file], ["analyze", file, "--out", out], ["reproduce", "f1", "--quick", "--out", out])
done = [CliRunner().invoke(app, command) for command in commands]
print(json.dumps([[one.exit_code, one.stdout, one.stderr] for one in done]))
"""
    done = alone(code, without=packages_beside(*CORE, "typer", "rich"))
    assert done.returncode == 0, done.stderr
    symmetries, analysis, paper = json.loads(done.stdout)
    assert symmetries[0] == 0, symmetries
    assert "diagonal" in symmetries[1]
    assert analysis[0] == 0, analysis
    assert "No picture: the figure of an analysis needs matplotlib, which is not installed: run pip" in analysis[2]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mine.json", "mine.html", "mine.analysis.safetensors"}
    assert paper[0] == 2, paper
    assert 'pip install "noetherflow[paper]"' in paper[2]


def test_nothing_is_said_of_what_is_there() -> None:
    _extras.require("cli", "torch", "numpy", purpose="this")
    assert _extras.has("torch")
    assert not _extras.has("torch", "a_package_that_nobody_wrote")
    with pytest.raises(nf.MissingExtraError, match="this needs nobody_wrote and wrote_nobody, which") as caught:
        _extras.require("cli", "torch", "nobody_wrote", "wrote_nobody", purpose="this")
    assert caught.value.name == "nobody_wrote"


def changed_by(*steps: str) -> list[list[str]]:
    """What of the global state is another after each of some pieces of code, which run one after another."""
    done = alone(f"STEPS = {steps!r}\n{STATE}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_changes_anything_global_when_it_is_imported() -> None:
    assert changed_by(EVERY_MODULE) == [[]]


CHANGES = {
    "matplotlib.rcParams['svg.hashsalt'] = 'ours'": "matplotlib.rcParams",
    "warnings.filterwarnings('ignore', 'nothing')": "warnings.filters",
    "torch.set_num_threads(torch.get_num_threads() + 1)": "threads",
    "torch.set_default_dtype(torch.float64)": "default dtype",
    "torch.manual_seed(1)": "torch's random state",
    "numpy.random.seed(1)": "numpy's random state",
    "random.seed(1)": "random state",
    "os.environ['NOBODY_READS_THIS'] = '7'": "environment",
    "logging.basicConfig(level=1)": "logging",
    "sys.path.append('nowhere')": "sys.path",
}


def test_a_change_of_the_global_state_is_noticed() -> None:
    assert changed_by(*CHANGES) == [[name] for name in CHANGES.values()]
