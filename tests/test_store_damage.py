"""Files that are not what they should be: each is refused in a sentence, and none yields a result."""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import noetherflow as nf
import stored
from cases import case
from same import require_same
from stored import results_of


@pytest.fixture
def noise() -> nf.NoiseMoments:
    return stored.noise()


def parts_of(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a safetensors file, the JSON of its result, and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["noetherflow"]), raw[8 + length :]


def assembled(header: dict[str, Any], content: Any, data: bytes, *, sign: bool = True) -> bytes:
    """A safetensors file of these parts; with `sign`, under the checksum that belongs to them."""
    text = content if isinstance(content, str) else json.dumps(content)
    header = header | {"__metadata__": header["__metadata__"] | {"noetherflow": text}}
    if sign:
        digest = hashlib.sha256(json.dumps(text).encode())
        dtypes = {"F64": "torch.float64", "F32": "torch.float32", "I64": "torch.int64"}
        for key in sorted(header.keys() - {"__metadata__"}):
            entry = header[key]
            start, stop = entry["data_offsets"]
            digest.update(json.dumps([key, dtypes[entry["dtype"]], entry["shape"]]).encode() + data[start:stop])
        header["__metadata__"]["sha256"] = digest.hexdigest()
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data


def edited(edit: Callable[[Any], Any], *, sign: bool = True) -> Callable[[bytes], bytes]:
    """A file whose JSON was changed in place, or replaced where `edit` returns something."""

    def apply(raw: bytes) -> bytes:
        header, content, data = parts_of(raw)
        replaced = edit(content)
        return assembled(header, content if replaced is None else replaced, data, sign=sign)

    return apply


def tensor_edited(place: str, **change: Any) -> Callable[[bytes], bytes]:
    """A file in which the header of a tensor was changed."""

    def apply(raw: bytes) -> bytes:
        header, content, data = parts_of(raw)
        header[key_of(header, place)].update(change)
        return assembled(header, content, data)

    return apply


def flipped_sign(place: str) -> Callable[[bytes], bytes]:
    """A file in which the last number of a tensor has another sign."""

    def apply(raw: bytes) -> bytes:
        header, content, data = parts_of(raw)
        last = header[key_of(header, place)]["data_offsets"][1] - 1
        return assembled(header, content, data[:last] + bytes([data[last] ^ 0x80]) + data[last + 1 :])

    return apply


def key_of(header: dict[str, Any], place: str) -> str:
    return next(key for key in header if key.endswith(place))


def without_tensor(raw: bytes) -> bytes:
    header, content, data = parts_of(raw)
    last = max(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    start, _ = header.pop(last)["data_offsets"]
    return assembled(header, content, data[:start])


def with_tensor(raw: bytes) -> bytes:
    header, content, data = parts_of(raw)
    header["extra"] = {"dtype": "F64", "shape": [1], "data_offsets": [len(data), len(data) + 8]}
    return assembled(header, content, data + bytes(8))


def flipped(raw: bytes, position: int) -> bytes:
    return raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]


def in_result(*path: str) -> Callable[[Any], Any]:
    """Walk into the JSON of a result."""

    def walk(content: Any) -> Any:
        for step in path:
            content = content["result" if step == "." else step]
        return content

    return walk


def setting(*path: str, to: Any) -> Callable[[bytes], bytes]:
    """A file in which an entry of the JSON has another value."""
    return edited(lambda content: in_result(*path[:-1])(content).__setitem__(path[-1], to))


def dropping(*path: str) -> Callable[[bytes], bytes]:
    return edited(lambda content: in_result(*path[:-1])(content).__delitem__(path[-1]))


HIDDEN = (".", "symmetries", "hidden")
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "truncated, damaged"),
    "three bytes": (lambda raw: raw[:3], "truncated, damaged"),
    "cut inside the header": (lambda raw: raw[:200], "truncated, damaged"),
    "cut after the header": (lambda raw: raw[: 8 + struct.unpack("<Q", raw[:8])[0]], "truncated, damaged"),
    "cut by one byte": (lambda raw: raw[:-1], "truncated, damaged"),
    "one byte too many": (lambda raw: raw + b"\0", "truncated, damaged"),
    "zeros": (lambda raw: bytes(len(raw)), "truncated, damaged"),
    "a tail of zeros": (lambda raw: raw[:-64] + bytes(64), "checksum"),
    "the last bit of a number": (lambda raw: flipped(raw, len(raw) - 8), "checksum"),
    "a huge header length": (lambda raw: b"\xff" * 8 + raw[8:], "truncated, damaged"),
    "a picture": (lambda raw: b"\x89PNG\r\n\x1a\n" + bytes(500), "truncated, damaged"),
    "a pickle": (lambda raw: pickle.dumps({"a": 1}), "truncated, damaged"),
    "plain JSON": (lambda raw: b'{"kind": "NoiseMoments"}', "truncated, damaged"),
    "weights": (lambda raw: safetensors.torch.save({"w": torch.ones(2)}), "another program"),
    "weights with metadata": (lambda raw: safetensors.torch.save({"w": torch.ones(2)}, {"a": "b"}), "another program"),
    "metadata that are not UTF-8": (lambda raw: raw.replace(b"noetherflow", b"noetherfl\xffw"), "truncated, damaged"),
    "malformed JSON": (edited(lambda content: '{"kind": '), "not JSON"),
    "JSON nested deeply": (edited(lambda content: "[" * 100_000), "not JSON"),
    "NaN in JSON": (edited(lambda content: '{"kind": NaN}'), "NaN is not JSON"),
    "an entry twice": (edited(lambda content: '{"kind": 1, "kind": 2}'), "twice"),
    "JSON of another form": (edited(lambda content: "[1, 2]"), "has not the entries"),
    "JSON changed, checksum not": (
        edited(lambda content: content["result"].__setitem__("count", 25), sign=False),
        "checksum",
    ),
    "another class": (setting("kind", to="Equilibrium"), "'Equilibrium', load it with that class"),
    "a class that is no name": (setting("kind", to=["x" * 500]), "load it with that class"),
    "a future format": (setting("format", to=99), "format 99"),
    "a format that is no number": (setting("format", to="1"), "format is '1'"),
    "no versions": (dropping("versions"), "has not the entries"),
    "a field missing": (dropping(".", "count"), "expected an object with the entries count"),
    "a field too many": (setting(".", "witness", to=None), "expected an object with the entries count"),
    "a field of another type": (setting(".", "count", to="24"), "type int, got '24'"),
    "a bool for an int": (setting(".", "count", to=True), "type int, got True"),
    "a negative count": (setting(".", "count", to=-24), "number of examples is -24"),
    "a list for an object": (setting(".", "mean", to=[]), "expected an object"),
    "a number for a tensor": (setting(".", "total_scatter", to=1.0), "expected the key of a tensor"),
    "the key of no tensor": (setting(".", "total_scatter", to="no such"), "a tensor 'no such', which is not there"),
    "a tensor twice": (
        edited(lambda c: c["result"]["mean"].__setitem__("0.bias", c["result"]["mean"]["0.weight"])),
        "belongs to another place",
    ),
    "a tensor missing": (without_tensor, "which is not there"),
    "a tensor too many": (with_tensor, "no place refers to the tensors 'extra'"),
    "a tensor of another shape": (tensor_edited("mean['0.weight']", shape=[4, 5]), "must have the same number of rows"),
    "statistics of another shape": (tensor_edited("scatter['hidden'].plus", shape=[5, 1]), "shape (5, 1), expected"),
    "a spread of another shape": (tensor_edited("spreads['hidden'].squares", shape=[5, 3]), "expected float64, (3, 5)"),
    "a tensor of another dtype": (tensor_edited("square_scatter['0.bias']", dtype="I64"), "dtype torch.int64"),
    "an unknown dtype": (
        lambda raw: raw.replace(b'"F64"', b'"F65"'),
        "truncated, damaged",
    ),
    "a symmetry of an unknown class": (
        setting(*HIDDEN, "class", to="Rotation"),
        "'Rotation', which is not an imported",
    ),
    "a class of a script with a name of ours": (setting(*HIDDEN, "package", to="__main__"), "not an imported Symmetry"),
    "a symmetry of an abstract class": (setting(*HIDDEN, "class", to="AxisSymmetry"), "not an imported Symmetry"),
    "a symmetry without a class": (dropping(*HIDDEN, "class"), "expected an object with the entries class"),
    "a symmetry that names no parameter": (
        edited(lambda c: in_result(*HIDDEN, "arguments")(c)["plus"][0].__setitem__("name", "9.weight")),
        "not among the parameters",
    ),
    "an axis that is not there": (
        edited(lambda c: in_result(*HIDDEN, "arguments")(c)["plus"][0].__setitem__("dim", 7)),
        "dim must lie",
    ),
    "a symmetry without axes": (
        edited(lambda c: in_result(*HIDDEN, "arguments")(c).update(plus=[], minus=[])),
        "needs at least one Axis",
    ),
    "a tuple of the wrong length": (
        edited(lambda c: in_result(*HIDDEN, "arguments")(c)["plus"][0].__setitem__("within", [0, 1])),
        "a sequence of length 3",
    ),
    "statistics of another symmetry": (
        edited(lambda c: c["result"]["spreads"].__setitem__("other", c["result"]["spreads"].pop("hidden"))),
        "spreads belongs to the symmetries ['other'], expected ['hidden']",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_a_sentence(damage: str, noise: nf.NoiseMoments, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    noise.save(path)
    whole = path.read_bytes()
    damaged, words = DAMAGES[damage]
    path.write_bytes(damaged(whole))
    assert path.read_bytes() != whole
    refused(nf.NoiseMoments, path, words)


def refused(kind: Any, path: Path, words: str) -> None:
    with pytest.raises(nf.FileError) as caught:
        kind.load(path)
    message = str(caught.value)
    assert isinstance(caught.value, nf.NoetherflowError)
    assert words in message
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    assert len(message) < 700 + 2 * len(str(path))
    assert f"{kind.__name__}.save" in message or "check the path" in message


def test_parts_put_together_again_are_loaded(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    """What the damages go through does no damage itself."""
    noise.save(tmp_path / "n")
    raw = (tmp_path / "n").read_bytes()
    for same in (assembled(*parts_of(raw)), assembled(*parts_of(raw), sign=False), edited(lambda content: None)(raw)):
        (tmp_path / "again").write_bytes(same)
        require_same(nf.NoiseMoments.load(tmp_path / "again"), noise)


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_refused(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    path = tmp_path / "n"
    noise.save(path)
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for position in torch.randint(len(raw), (60,), generator=generator).tolist():
        path.write_bytes(raw[:position])
        refused(nf.NoiseMoments, path, "truncated, damaged")
        path.write_bytes(flipped(raw, position))
        if position >= header:
            refused(nf.NoiseMoments, path, "checksum")
        else:  # a blank that pads the header may change; a number may not
            with pytest.raises(nf.FileError):
                nf.NoiseMoments.load(path)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        (nf.Equilibrium, setting(".", "outcomes", "hidden", "status", to="ASLEEP"), "expected one of CONVERGED"),
        (nf.Equilibrium, setting(".", "outcomes", to={}), "outcomes belongs to the symmetries []"),
        (nf.Equilibrium, setting(".", "potential_after", to="7ff"), "potential_after: expected a number"),
        (nf.Equilibrium, setting(".", "potential_after", to=None), "potential_after: expected a number"),
        (nf.Equilibrium, tensor_edited("coordinates['hidden']", shape=[5, 1]), "expected float64, (5,)"),
        (nf.Equilibrium, setting("kind", to="NoiseMoments"), "class 'NoiseMoments'"),
        (nf.Analysis, setting(".", "settings", "arguments", "lr", to=-1), "lr"),
        (nf.Analysis, setting(".", "settings", "arguments", "batch_size", to=0.5), "type int"),
        (nf.Analysis, setting(".", "reports", to=[]), "the reports [] are not those of the symmetries"),
        (nf.Analysis, tensor_edited("initial['0.weight']", shape=[4, 5]), "shapes"),
        (nf.Analysis, setting(".", "noise", "count", to=-1), "number of examples is -1"),
        (nf.SecondMoments, setting(".", "steps", "0.bias", to=0), "steps['0.bias'] is 0, expected 1 or more"),
        (nf.SecondMoments, dropping(".", "steps", "0.bias"), "steps belongs to ['0.weight'"),
        (nf.SecondMoments, dropping(".", "eps", "0.bias"), "eps belongs to ['0.weight'"),
        (nf.SecondMoments, setting(".", "without", to=["0.bias"]), "['0.bias'] have second moments, and have taken no"),
        (nf.SecondMoments, tensor_edited("values['0.bias']", dtype="I64"), "dtype torch.int64, expected float64"),
        (nf.SecondMoments, tensor_edited("values['0.weight']", shape=[4, 5]), "must have the same number of rows"),
        (nf.SecondMoments, flipped_sign("values['0.bias']"), "holds numbers below 0"),
        (nf.Explanation, setting(".", "found", to=None), "found: expected a sequence"),
        (nf.Explanation, dropping("result"), "has not the entries"),
    ],
)
def test_damage_to_other_results_is_refused(
    kind: Any, damage: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    results = {type(result): result for result in (*results_of(case("diagonal")), stored.explanation())}
    path = tmp_path / "x"
    results[kind].save(path)
    path.write_bytes(damage(path.read_bytes()))
    refused(kind, path, words)


def test_a_path_without_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    refused(nf.NoiseMoments, tmp_path / "nothing.safetensors", "there is no such file")
    refused(nf.NoiseMoments, tmp_path, "a folder or a device")
    refused(nf.NoiseMoments, Path("/dev/zero"), "a folder or a device")
    refused(nf.NoiseMoments, tmp_path / ("x" * 5000), "cannot be read")
    with pytest.raises(nf.FileError, match="no such file"):
        nf.NoiseMoments.load("a\0b")


def test_a_message_stays_on_one_line_where_a_path_or_a_name_does_not(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    for name in ("a\nb", "a\r\nb\u2028c"):
        with pytest.raises(nf.FileError) as caught:
            nf.NoiseMoments.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused_in_a_sentence(noise: nf.NoiseMoments, tmp_path: Path) -> None:
    noise.save(tmp_path / "n")
    (tmp_path / "n").chmod(0)
    refused(nf.NoiseMoments, tmp_path / "n", "cannot be read")


def test_a_result_is_loaded_with_its_class_only(tmp_path: Path) -> None:
    for result in results_of(case("diagonal")):
        result.save(tmp_path / "x")
        for kind in (nf.NoiseMoments, nf.Equilibrium, nf.Analysis, nf.SecondMoments, nf.Explanation):
            if kind is type(result):
                require_same(kind.load(tmp_path / "x"), result)
            else:
                refused(kind, tmp_path / "x", f"class {type(result).__name__!r}, load it with that class")
