"""Memories: the latest vectors, each with its own place."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spade3d.contrast.memory import Memory
from spade3d.crops.selection import Places


def numbered(*numbers):
    """Vectors whose direction, places whose mm and space all tell one number."""
    turn = torch.tensor(numbers, dtype=torch.float32) / 100
    mm = np.array(numbers, dtype=float)[:, None] * np.ones(3)
    return torch.stack([turn.cos(), turn.sin()], dim=1) * 5, Places(mm, np.array(numbers, dtype=np.int64))


def content(memory):
    """The numbers that a memory holds, from the vectors and from the places alike."""
    of_vectors = (torch.atan2(memory.vectors[:, 1], memory.vectors[:, 0]) * 100).round().int().tolist()
    assert of_vectors == memory.places.mm[:, 0].astype(int).tolist() == memory.places.space.tolist()
    return of_vectors


def test_the_oldest_give_way():
    memory = Memory(5, 2, place_width=3)
    assert len(memory) == 0 and memory.vectors.shape == (0, 2) and memory.places.mm.shape == (0, 3)
    memory.remember(*numbered(1, 2, 3))
    assert len(memory) == 3 and content(memory) == [1, 2, 3]
    memory.remember(*numbered(4, 5, 6, 7))
    assert len(memory) == 5 and sorted(content(memory)) == [3, 4, 5, 6, 7]
    memory.remember(*numbered(8))
    assert sorted(content(memory)) == [4, 5, 6, 7, 8]


def test_of_more_than_it_holds_the_last_are_kept():
    memory = Memory(4, 2, place_width=3)
    memory.remember(*numbered(1, 2))
    memory.remember(*numbered(*range(10, 20)))
    assert sorted(content(memory)) == [16, 17, 18, 19]
    memory.remember(*numbered(30, 31))
    assert sorted(content(memory)) == [18, 19, 30, 31]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_memory_holds_what_a_list_would(size):
    rng, memory, slow = np.random.default_rng(size), Memory(size, 2, place_width=3), []
    for start in range(0, 120, 12):
        numbers = range(start, start + int(rng.integers(0, 12)))
        slow = [*slow, *numbers][-size:]
        if len(numbers):
            memory.remember(*numbered(*numbers))
        assert sorted(content(memory)) == slow


def test_vectors_are_remembered_on_the_unit_sphere_without_gradient():
    memory = Memory(4, 3, place_width=6)
    vectors = torch.randn(3, 3, requires_grad=True)
    memory.remember(vectors, Places(np.zeros((3, 6)), np.zeros(3, dtype=np.int64)))
    torch.testing.assert_close(memory.vectors, F.normalize(vectors.detach(), dim=-1))
    assert not memory.vectors.requires_grad
    memory.remember(torch.randn(1, 3, dtype=torch.bfloat16), Places(np.zeros((1, 6)), np.zeros(1, dtype=np.int64)))
    assert memory.vectors.dtype == torch.float32


def test_nothing_to_remember_changes_nothing():
    memory = Memory(4, 2, place_width=3)
    memory.remember(*numbered(1, 2))
    memory.remember(torch.zeros(0, 2), Places(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)))
    assert content(memory) == [1, 2]


def test_a_memory_travels_in_the_state_dict():
    memory = Memory(5, 2, place_width=3)
    memory.remember(*numbered(*range(7)))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = Memory(5, 2, place_width=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    for later in (numbered(20), numbered(21, 22, 23)):
        assert content(other) == content(memory)  # slot by slot, so that what follows stays the same
        memory.remember(*later)
        other.remember(*later)
    assert content(other) == content(memory)


def test_a_memory_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Memory(4, 2, place_width=3).load_state_dict(Memory(5, 2, place_width=3).state_dict())


def test_slots_are_written_as_runs(torch_calls):
    """No index is sent to the device, which would have to be waited for."""
    memory = Memory(5, 2, place_width=3)
    with torch_calls() as watch:
        for numbers in ((1, 2, 3), (4, 5, 6, 7), (8,)):
            memory.remember(*numbered(*numbers))
    assert content(memory) == [6, 7, 8, 4, 5]
    assert watch.calls and not any("index" in asked.name() for asked, _ in watch.calls)
