from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from bigray.errors import StorageError
from bigray.training.tensor_files import check_tensor_file, pack_tensors, tensor_chunks, unpack_tensors


def _of_every_kind() -> dict[str, torch.Tensor]:
    return {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "counter": torch.tensor(7),
        "half": torch.randn(3).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "eighth": torch.randn(5).to(torch.float8_e4m3fn),
        "double": torch.randn(2, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


def test_tensors_of_every_layout_and_kind_survive() -> None:
    tensors = _of_every_kind()
    read_back = unpack_tensors(pack_tensors(tensors))

    assert set(read_back) == set(tensors)
    for name, tensor in tensors.items():
        assert read_back[name].dtype == tensor.dtype
        assert read_back[name].shape == tensor.shape
        assert read_back[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_a_file_is_what_the_library_itself_writes() -> None:
    usual = ("transposed", "channels_last", "counter", "half")
    tensors = {name: tensor.contiguous() for name, tensor in _of_every_kind().items() if name in usual}

    assert pack_tensors(tensors) == safetensors.torch.save(tensors)


def test_a_state_of_no_tensors_survives() -> None:
    assert unpack_tensors(pack_tensors({})) == {}


def test_the_chunks_are_the_tensors_own_memory() -> None:
    weight = torch.zeros(4)
    _, chunk = tensor_chunks({"w": weight})
    weight.fill_(1.0)

    assert bytes(chunk) == torch.ones(4).numpy().tobytes()


def test_views_of_one_tensor_survive() -> None:
    whole = torch.arange(6.0)
    read_back = unpack_tensors(pack_tensors({"whole": whole, "end": whole[2:], "start": whole[:3]}))

    assert read_back["whole"].equal(whole)
    assert read_back["end"].equal(whole[2:])
    assert read_back["start"].equal(whole[:3])


def test_tied_weights_survive() -> None:
    def tied() -> torch.nn.Sequential:
        first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        second.weight = first.weight
        return torch.nn.Sequential(first, second)

    source, copy = tied(), tied()
    copy.load_state_dict(unpack_tensors(pack_tensors(source.state_dict())))

    assert copy[0].weight is copy[1].weight
    for name, tensor in source.state_dict().items():
        assert copy.state_dict()[name].equal(tensor)


def test_a_dtype_that_the_format_has_not_is_named() -> None:
    with pytest.raises(StorageError, match="tensor 'w': dtype complex128 cannot be saved; use one of float64"):
        pack_tensors({"w": torch.zeros(2, dtype=torch.complex128)})


def test_what_was_packed_passes_the_check() -> None:
    for tensors in (_of_every_kind(), {}):
        check_tensor_file(pack_tensors(tensors), "a")


def _file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + pack_tensors({"w": torch.ones(2)})[8:],
        (5).to_bytes(8, "little") + b'{"w":',
        _file([]),
        _file({"w": 3}),
        _file({"w": _entry(0, 8, [2], "F99")}, bytes(8)),
        _file({"w": _entry(0, 8, [2])}, bytes(7)),
        _file({"w": _entry(0, 8, [2])}, bytes(9)),
        _file({"w": _entry(0, 8, [3])}, bytes(8)),
        _file({"w": _entry(-8, 0, [2])}, bytes(8)),
        _file({"w": _entry(0, 8, [2]), "v": _entry(4, 12, [2])}, bytes(12)),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=[
        *("empty", "too short", "header length 2^63", "half a header", "a list", "no entry", "unknown dtype"),
        *("data cut short", "data too long", "shape too large", "starts before", "overlap", "nested"),
    ],
)
def test_what_is_no_whole_file_is_refused_with_its_place(data: bytes) -> None:
    with pytest.raises(StorageError, match=r"^ckpt/model: not a safetensors file: ") as caught:
        check_tensor_file(data, "ckpt/model")

    assert "\n" not in str(caught.value)
