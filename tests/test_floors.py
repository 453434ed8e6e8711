"""A file imports only from lower floors or from its own folder."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "noetherflow"
# What lies directly in src/noetherflow, file or folder, from the ground up. docs/design.md says what each floor is for.
FLOORS = [
    {"_types", "_errors", "_spd", "_progress", "_batch", "_files", "_versions", "_table", "_codec"}
    | {"_patterns"}
    | {"_autograd", "_holder", "_precision", "_extras", "_undo", "_fingerprint", "_device"},
    {"_params", "_per_example", "_store", "_other_roads", "record"},
    {"optimizers"},
    {"_model_function", "symmetry", "_user_file"},
    {"_residual", "_dtype", "_optimizer_state", "_perturbed", "_given", "_examples"},
    {"_verify"},
    {"detect"},
    {"noise", "discover"},
    {"_second_moments"},
    {"_minibatch"},
    {"_forces"},
    {"_drift", "_falling", "linear", "_explain"},
    {"equilibrium"},
    {"_rebalance", "simulation", "_analysis", "forecasting", "watching", "ledger"},
    {"_analyze", "_kept", "integrations", "_doctor"},
    {"report"},
    {"paper", "_cli_options", "_cli_outputs"},
    {"_cli"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
GROUND = {"_types", "_errors"}  # what the other files of floor 0 may import


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[1:-1] if parts[-1] == "__init__" else parts[1:]


def imports_of(code: str, module: tuple[str, ...], *, is_init: bool) -> set[str]:
    """Top-level names of the package that a module imports, anywhere in it; the package itself is ''."""
    home = (PACKAGE, *(module if is_init else module[:-1]))
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            # `from noetherflow import _spd` imports a file, `from noetherflow import SGD` the package.
            below = [(*base, alias.name) for alias in node.names] if base == (PACKAGE,) else [base]
            found |= {name if name[1:2] == () or name[1] in FLOOR_OF else base for name in below}
    return {"".join(name[1:2]) for name in found if name[0] == PACKAGE}


def violations(code: str, module: tuple[str, ...], *, is_init: bool = False) -> list[str]:
    """The imports of a module that lead neither down nor stay in its folder, as sentences."""
    if module == ():
        return []  # the public names may come from anywhere
    here, where = module[0], ".".join(module)
    if here not in FLOOR_OF:
        return [f"{where} is on no floor: add it to FLOORS"]
    wrong = []
    for there in sorted(imports_of(code, module, is_init=is_init) - {here}):
        if there not in FLOOR_OF:
            wrong.append(f"{where} imports {there or 'the package itself'}, which is on no floor")
        elif FLOOR_OF[there] >= FLOOR_OF[here] and not (FLOOR_OF[here] == 0 and here not in GROUND and there in GROUND):
            wrong.append(f"{where} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]})")
    return wrong


def test_every_file_imports_only_from_below_or_from_its_own_folder() -> None:
    files = sorted((SOURCE / PACKAGE).rglob("*.py"))
    assert files
    wrong = [
        sentence
        for path in files
        for sentence in violations(path.read_text("utf-8"), module_of(path), is_init=path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("_drift", "from noetherflow.equilibrium import solve_equilibrium"),
        ("symmetry.axis", "import noetherflow._cli"),
        ("symmetry.axis", "import noetherflow._cli as cli"),
        ("symmetry.axis", "from .. import _drift"),
        ("symmetry.axis", "from ..noise.moments import NoiseMoments"),
        ("symmetry.axis", "def late():\n    from noetherflow._verify import verify_symmetry"),
        ("_params", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from noetherflow import symmetry"),
        ("_cli", "import noetherflow as nf"),
        ("_cli", "from noetherflow import SGD"),
        ("_cli", "from . import SGD"),
        ("_verify", "from noetherflow.noise import estimate_noise"),
        ("_types", "from noetherflow._errors import LossError"),
        ("_spd", "from noetherflow.optimizers import SGD"),
        ("attic", "import torch"),
        ("_cli", "from noetherflow.attic import old"),
    ],
)
def test_an_import_that_leads_up_is_found(module: str, code: str) -> None:
    assert violations(code, tuple(module.split(".")))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("optimizers.sgd", "from noetherflow._errors import SettingsError"),
        ("symmetry.scalar", "from noetherflow.symmetry.axis import Axis"),
        ("symmetry.scalar", "from .axis import Axis\nfrom .._spd import expm\nfrom .. import _params"),
        ("_cli", "import torch\nfrom noetherflow import _drift, report"),
    ],
)
def test_an_import_that_leads_down_or_stays_in_its_folder_is_allowed(module: str, code: str) -> None:
    assert not violations(code, tuple(module.split(".")))


def test_a_relative_import_in_a_folder_init_starts_from_that_folder() -> None:
    assert not violations("from .axis import Axis", ("symmetry",), is_init=True)
    assert violations("from .._drift import drift", ("symmetry",), is_init=True)
