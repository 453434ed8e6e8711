"""Wall time of a step of many replicas: a plain loop, eager vmap, JAX, and `nf.simulate`.

    python benchmarks/simulate.py           checks that the four variants agree, times the variants, writes the results
                                            (ten minutes)
    python benchmarks/simulate.py --show    prints the table of the results and draws the figure

All variants run in one process on one core with one thread. Each round times the four variants in turn, so that a
change of the machine's load affects all variants alike. The script needs the extra `bench`.
"""

import os

# Before the import of torch and JAX, which read the number of threads at import.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import noetherflow as nf

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "benchmarks/results/simulate.json", ROOT / "docs/benchmarks.svg"
SIZE, HIDDEN, BATCH, LR = 20, 4, 10, 0.005
REPLICAS = (1, 64, 1024)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MODELS = {
    "factorisation": lambda: nn.Sequential(nn.Linear(SIZE, HIDDEN, bias=False), nn.Linear(HIDDEN, SIZE, bias=False)),
    "tanh": lambda: nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SIZE)),
}
VARIANTS = {"loop": "plain loop", "vmap": "eager vmap", "jax": "JAX", "simulate": "nf.simulate"}
# Steps of a measurement by number of replicas: about a second each. The loop runs 2 replicas; its time is scaled.
STEPS = {
    "vmap": {1: 500, 64: 400, 1024: 60},
    "jax": {1: 30_000, 64: 2_000, 1024: 150},
    "simulate": {1: 20_000, 64: 8_000, 1024: 500},
}
LOOP_REPLICAS, LOOP_STEPS = 2, 600

Params = dict[str, Tensor]
Tape = tuple[Tensor, Tensor]  # inputs and labels, shape (steps, replicas, BATCH, SIZE) each


class Setting(NamedTuple):
    """A model with its data type, initialisation and data distribution."""

    model: str
    dtype: torch.dtype

    def net(self) -> nn.Sequential:
        return MODELS[self.model]().to(self.dtype)

    def start(self, replicas: int) -> Params:
        generator = torch.Generator().manual_seed(1)
        shapes = {name: tensor.shape for name, tensor in self.net().named_parameters()}
        return {
            name: (torch.randn(replicas, *shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(
                self.dtype
            )
            for name, shape in shapes.items()
        }

    def target(self) -> Tensor:
        """V of rank HIDDEN, shape (SIZE, SIZE)."""
        generator = torch.Generator().manual_seed(2)
        left, right = (torch.randn(SIZE, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
        return (left @ right.mT / SIZE).to(self.dtype)

    def sampler(self) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
        target = self.target()

        def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, SIZE, generator=generator, dtype=self.dtype)
            return x, x @ target.mT + torch.randn(count, SIZE, generator=generator, dtype=self.dtype)

        return sample


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().sum(-1)


class Ran(NamedTuple):
    """Final parameters by name, shape (replicas, ...), and the mean loss before each step, shape (steps, replicas)."""

    params: Params
    losses: Tensor


def run_loop(setting: Setting, replicas: int, steps: int, tape: Tape | None = None) -> Ran:
    """Run the replicas in sequence, each with a plain loop around `torch.optim.SGD`."""
    sample, starts, generator = setting.sampler(), setting.start(replicas), torch.Generator().manual_seed(3)
    ends, losses = [], torch.zeros(steps, replicas)
    for replica in range(replicas):
        model = setting.net()
        model.load_state_dict({name: stack[replica] for name, stack in starts.items()})
        optimizer = torch.optim.SGD(model.parameters(), LR)
        for step in range(steps):
            batch = sample(BATCH, generator) if tape is None else (tape[0][step, replica], tape[1][step, replica])
            optimizer.zero_grad()
            loss = squared_error(model, batch).mean()
            loss.backward()
            optimizer.step()
            losses[step, replica] = loss.detach()
        ends.append(model.state_dict())
    return Ran({name: torch.stack([end[name] for end in ends]) for name in starts}, losses)


def run_vmap(setting: Setting, replicas: int, steps: int, tape: Tape | None = None) -> Ran:
    """Run all replicas at once by `torch.func.vmap`."""
    sample, params, generator = setting.sampler(), setting.start(replicas), torch.Generator().manual_seed(4)
    net, losses = setting.net(), []

    def loss(replica: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = (functional_call(net, replica, (x,)) - y).square().sum(-1).mean()
        return value, value

    gradients = vmap(grad(loss, has_aux=True))
    for step in range(steps):
        if tape is None:
            x, y = (tensor.unflatten(0, (replicas, BATCH)) for tensor in sample(replicas * BATCH, generator))
        else:
            x, y = tape[0][step], tape[1][step]
        slopes, values = gradients(params, x, y)
        params = {name: stack - LR * slopes[name] for name, stack in params.items()}
        losses.append(values.detach())
    return Ran({name: stack.detach() for name, stack in params.items()}, torch.stack(losses))


class Jax:
    """jit(vmap(scan)) in JAX, compiled for a setting, a number of replicas and a number of steps."""

    def __init__(self, setting: Setting, replicas: int, steps: int, *, watch: bool, tape: Tape | None = None) -> None:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        dtype = jnp.dtype(str(setting.dtype).removeprefix("torch."))
        target = jnp.asarray(setting.target().numpy())
        self._jax, self._replicas = jax, replicas
        self._params = {name: jnp.asarray(stack.numpy()) for name, stack in setting.start(replicas).items()}

        def network(params: dict[str, Any], x: Any) -> Any:
            if setting.model == "factorisation":
                return x @ params["0.weight"].T @ params["1.weight"].T
            hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
            return hidden @ params["2.weight"].T + params["2.bias"]

        def loss(params: dict[str, Any], x: Any, y: Any) -> Any:
            return jnp.mean(jnp.sum((network(params, x) - y) ** 2, -1))

        def step(params: dict[str, Any], x: Any, y: Any) -> tuple[dict[str, Any], Any]:
            value, slopes = jax.value_and_grad(loss)(params, x, y)
            # XLA removes the computation of values that are not returned.
            return {name: p - LR * slopes[name] for name, p in params.items()}, value if watch else None

        def fresh(params: dict[str, Any], key: Any) -> Any:
            def body(carry: Any, _: Any) -> Any:
                params, key = carry
                key, inputs, noises = jax.random.split(key, 3)
                x = jax.random.normal(inputs, (BATCH, SIZE), dtype)
                params, value = step(params, x, x @ target.T + jax.random.normal(noises, (BATCH, SIZE), dtype))
                return (params, key), value

            (params, _), values = jax.lax.scan(body, (params, key), None, length=steps)
            return params, values

        def given(params: dict[str, Any], x: Any, y: Any) -> Any:
            return jax.lax.scan(lambda params, batch: step(params, *batch), params, (x, y))

        began = time.perf_counter()
        if tape is None:
            self._arguments = (jax.random.split(jax.random.key(5), replicas),)
            function = jax.jit(jax.vmap(fresh))
        else:
            self._arguments = tuple(jnp.asarray(tensor.transpose(0, 1).numpy()) for tensor in tape)
            function = jax.jit(jax.vmap(given))
        self._compiled = function.lower(self._params, *self._arguments).compile()
        self.setup = time.perf_counter() - began

    def __call__(self) -> Any:
        return self._jax.block_until_ready(self._compiled(self._params, *self._arguments))

    def ran(self) -> Ran:
        params, losses = self()
        return Ran(
            {name: torch.tensor(stack.tolist(), dtype=torch.float64) for name, stack in params.items()},
            torch.tensor(losses.tolist(), dtype=torch.float64).mT,
        )


def run_simulate(setting: Setting, replicas: int, steps: int, tape: Tape | None = None, record: Any = None) -> Ran:
    """Run `nf.simulate` with its defaults, which record the loss about 200 times."""
    sample = setting.sampler()
    if tape is not None:
        examples, position = [tensor.flatten(0, 2) for tensor in tape], 0

        def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            nonlocal position
            index = (position + torch.arange(count)) % len(examples[0])
            position += count
            return examples[0][index], examples[1][index]

    trajectory = nf.simulate(
        setting.net(),
        squared_error,
        sample,
        nf.SGD(LR, BATCH),
        steps=steps,
        start=setting.start(replicas),
        dtype=setting.dtype,
        record=record,
        generator=torch.Generator().manual_seed(6),
        progress=False,
    )
    return Ran(trajectory.params, trajectory.loss[:-1])


def same_trajectory(setting: Setting, *, replicas: int = 3, steps: int = 200) -> dict[str, float]:
    """Largest difference of the final parameters from the plain loop on equal examples, over the largest parameter."""
    generator = torch.Generator().manual_seed(7)
    x, y = (t.unflatten(0, (steps, replicas, BATCH)) for t in setting.sampler()(steps * replicas * BATCH, generator))
    tape = x, y
    expected = run_loop(setting, replicas, steps, tape).params
    others = {
        "vmap": run_vmap(setting, replicas, steps, tape).params,
        "jax": Jax(setting, replicas, steps, watch=True, tape=tape).ran().params,
        "simulate": run_simulate(setting, replicas, steps, tape).params,
    }
    distances = {
        name: max(float((params[key] - p).abs().max() / p.abs().max()) for key, p in expected.items())
        for name, params in others.items()
    }
    allowed = 3e-5 if setting.dtype == torch.float32 else 1e-12
    assert max(distances.values()) < allowed, (setting, distances)
    return distances


def same_curve(setting: Setting, *, steps: int = 200, replicas: int = 1024, few: int = 64) -> dict[str, float]:
    """Largest difference of the mean loss from the plain loop, in standard errors, at ten times."""
    times = torch.arange(0, steps, steps // 10)
    expected = run_loop(setting, few, steps).losses[times].double()
    # The loop runs `few` replicas, whose initial parameters are those of the first replicas of every variant.
    others = {
        "vmap": run_vmap(setting, replicas, steps).losses,
        "jax": Jax(setting, replicas, steps, watch=True).ran().losses,
        "simulate": run_simulate(setting, replicas, steps, record=1).losses,
    }
    deviations = {}
    for name, losses in others.items():
        first = losses[times].double()[:, :few]
        error = ((first.var(1) + expected.var(1)) / few).sqrt()
        deviations[name] = float(((first.mean(1) - expected.mean(1)) / error).abs().max())
    # With all replicas the standard error is smaller: compare `nf.simulate` with JAX.
    simulated, jax = others["simulate"][times].double(), others["jax"][times].double()
    error = ((simulated.var(1) + jax.var(1)) / replicas).sqrt()
    deviations["simulate against jax"] = float(((simulated.mean(1) - jax.mean(1)) / error).abs().max())
    assert max(deviations.values()) < 4.5, (setting, deviations)
    return deviations


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(setting: Setting, replicas: int, rounds: int) -> dict[str, Any]:
    """Microseconds per step of all replicas: a time for each round and variant, medians, and ratios."""
    steps = {name: STEPS[name][replicas] for name in STEPS}
    jax = Jax(setting, replicas, steps["jax"], watch=False)
    jax()
    turns: dict[str, Callable[[], float]] = {
        "loop": lambda: (
            seconds(lambda: run_loop(setting, LOOP_REPLICAS, LOOP_STEPS)) / LOOP_STEPS * replicas / LOOP_REPLICAS
        ),
        "vmap": lambda: seconds(lambda: run_vmap(setting, replicas, steps["vmap"])) / steps["vmap"],
        "jax": lambda: seconds(jax) / steps["jax"],
        "simulate": lambda: seconds(lambda: run_simulate(setting, replicas, steps["simulate"])) / steps["simulate"],
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    setups = []
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(round(1e6 * turn(), 2))
        setups.append(seconds(lambda: run_simulate(setting, replicas, 1)))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(ours / other for ours, other in zip(times["simulate"], times[name], strict=True))
        for name in ("loop", "vmap", "jax")
    }
    return {
        "model": setting.model,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "replicas": replicas,
        "median": median,
        "rounds": times,
        "simulate over": ratios,
        "setup seconds": {"simulate": statistics.median(setups), "jax": jax.setup},
    }


def environment() -> dict[str, Any]:
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "jax", "jaxlib", "noetherflow")},
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cores used": 1,
        "torch threads": torch.get_num_threads(),
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
    }


def run(rounds: int) -> None:
    torch.set_num_threads(1)
    settings = [Setting(model, dtype) for model in MODELS for dtype in DTYPES.values()]
    checks = [
        {
            "model": setting.model,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "distance from the loop on the same examples": same_trajectory(setting),
            "standard errors between loss curves": same_curve(setting),
        }
        for setting in settings
    ]
    print(json.dumps(checks, indent=1), flush=True)
    measured = []
    for setting in settings:
        for replicas in REPLICAS:
            measured.append(measure(setting, replicas, rounds))
            print(json.dumps(measured[-1]), flush=True)
    result = {
        "unit": "microseconds per step of all replicas",
        "loop": f"{LOOP_REPLICAS} replicas are timed, and their time per replica multiplied by the number of replicas",
        "simulate": "the whole call, with set-up; `setup seconds` is a call of one step",
        "jax": "after compilation, whose time is in `setup seconds`",
        "examples per step and replica": BATCH,
        "environment": environment(),
        "checks": checks,
        "measured": measured,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def show() -> None:
    measured = json.loads(RESULTS.read_text("utf-8"))["measured"]
    heads = ["model", "dtype", "R", *VARIANTS.values(), "loop / ours", "ours / JAX"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * 2 + "---:|" * (len(heads) - 2))
    for entry in measured:
        cells = [entry["model"], entry["dtype"], f"{entry['replicas']:,}"]
        for name in VARIANTS:
            times = entry["rounds"][name]
            cells.append(f"{entry['median'][name]:,.0f} ({min(times):,.0f} to {max(times):,.0f})")
        ratios = entry["simulate over"]
        print("| " + " | ".join([*cells, f"{1 / ratios['loop']:.0f}", f"{ratios['jax']:.2f}"]) + " |")
    draw(measured)


def draw(measured: list[dict[str, Any]]) -> None:
    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 9})
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True, layout="constrained")
    panels = [(model, dtype) for model in MODELS for dtype in DTYPES]
    for axis, (model, dtype) in zip(axes, panels, strict=True):
        entries = [entry for entry in measured if (entry["model"], entry["dtype"]) == (model, dtype)]
        for name, mark in zip(VARIANTS, ("s:", "^:", "D--", "o-"), strict=True):
            middle = [entry["median"][name] for entry in entries]
            spread = [
                [m - min(entry["rounds"][name]) for m, entry in zip(middle, entries, strict=True)],
                [max(entry["rounds"][name]) - m for m, entry in zip(middle, entries, strict=True)],
            ]
            axis.errorbar(REPLICAS, middle, spread, fmt=mark, capsize=2, markersize=4, label=VARIANTS[name])
        axis.set(xscale="log", yscale="log", xlabel="replicas", title=f"{model}, {dtype}", xticks=REPLICAS)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{replicas}" for replicas in REPLICAS])
    axes[0].set_ylabel("microseconds per step")
    axes[0].legend(fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})
    # Matplotlib writes trailing spaces into SVG paths, which `git diff --check` reports.
    FIGURE.write_text("\n".join(line.rstrip() for line in FIGURE.read_text("utf-8").splitlines()) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table and draw the figure of the last results")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; a round times each variant once")
    arguments = parser.parse_args()
    if arguments.show:
        show()
    else:
        run(arguments.rounds)
