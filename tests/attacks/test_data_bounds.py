"""Data that a stranger made: what they unpack to is bounded before it is unpacked."""

import gzip
import io
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_app.data import decode, published
from client_app.data.colours import LUMA, recoloured
from client_app.data.decode import decode_picture, picture_range
from common.errors import DataError
from experiments.deploy import predictions


@pytest.mark.parametrize(("mode", "name"), [("1", "big.png"), ("I;16", "deep.png")])
def test_a_picture_has_so_many_pixels(mode: str, name: str) -> None:
    packed = io.BytesIO()
    Image.new(mode, (8000, 7000)).save(packed, "PNG")
    assert len(packed.getvalue()) < 500_000
    with pytest.raises(DataError, match=f"{name} .*8000 x 7000 pixels; at most 50,000,000"):
        decode_picture(packed.getvalue(), channels=1, image_size=32, name=name)
    with pytest.raises(DataError, match="8000 x 7000"):
        picture_range(packed.getvalue(), name)


def test_many_pictures_become_grey_a_part_at_a_time() -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (600, 3, 4, 4), dtype=np.uint8)
    wanted = np.rint((pictures * np.array(LUMA, np.float32)[:, None, None]).sum(1))
    assert np.abs(recoloured(pictures, 1)[:, 0] - wanted).max() <= 1
    assert recoloured(pictures[:0], 1).shape == (0, 1, 4, 4)


def test_what_is_packed_is_no_larger_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MOST_IDX", 10_000)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    for said, there in ((100, 10**7), (10**7, 10**7), (10_000, 9_999)):
        with gzip.open(path, "wb") as file:
            file.write(bytes([0, 0, 8, 1]) + struct.pack(">I", said) + bytes(there))
        tracemalloc.start()
        with pytest.raises(DataError, match="is not a whole IDX file of at most 10,000"):
            published.read_idx(path, 1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"abc")
    assert published.read_idx(path, 1).tobytes() == b"abc"


def test_arrays_that_unpack_to_much_more_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "FEW_BYTES", 1000)
    np.savez_compressed(tmp_path / "bomb.npz", inputs=np.zeros((1000, 1000)))
    np.savez_compressed(tmp_path / "fine.npz", inputs=np.random.default_rng(0).random((100, 10)))
    with pytest.raises(DataError, match="it unpacks to 8,000,128 bytes"):
        predictions._read(tmp_path / "bomb.npz", ["inputs"])
    assert predictions._read(tmp_path / "fine.npz", ["inputs"])["inputs"].shape == (100, 10)


def test_threads_decode_so_many_pixels_at_a_time() -> None:
    room, held, most = decode._InFlight(10), [0], [0]

    def hold(_: int) -> None:
        with room.of(4):
            held[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.01)
            held[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(hold, range(16))]
    assert most[0] == 2
