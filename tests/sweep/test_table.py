"""The fronts of a sweep: what nothing else beats, and what noise hides."""

from quantkit.sweep.table import NOISE, front


def cell(name, kl, n_bytes=100, times=1.0, mad=0.0):
    speed = {"decode_times_original": times, "decode_times_original_mad": mad}
    return {
        "id": name,
        "evaluation": {"kl_mean": kl},
        "size": {"quantized_bytes": n_bytes},
        "memory_bytes": n_bytes,
        "speed": speed,
    }


def test_the_front_holds_what_nothing_as_small_beats():
    cells = [
        cell("a", 0.1, 10),
        cell("b", 0.2, 10),
        cell("c", 0.05, 30),
        cell("d", 0.07, 40),
        cell("e", 0.01, 50),
    ]
    assert front(cells, "size") == front(cells, "memory") == ["a", "c", "e"]
    assert front(cells[::-1], "size") == ["a", "c", "e"]


def test_of_cells_alike_in_both_the_first_one_stays():
    assert front([cell("a", 0.1), cell("b", 0.1)], "size") == ["a"]
    assert front([cell("a", 0.1, 20), cell("b", 0.1, 10)], "size") == ["b"]


def test_a_faster_cell_must_be_faster_beyond_the_noise():
    slow = cell("good", 0.01, times=3.0, mad=0.1)
    assert front([slow, cell("poor", 0.02, times=3.3, mad=0.1)], "decode") == ["good"]
    assert front([slow, cell("poor", 0.02, times=3.5, mad=0.1)], "decode") == ["poor", "good"]
    assert front([slow, cell("poor", 0.02, times=3.0 + 0.2 * NOISE, mad=0.1)], "decode") == ["good"]


def test_a_cell_is_beaten_by_a_closer_one_that_may_be_as_fast():
    cells = [
        cell("best", 0.01, times=1.0),
        cell("noisy", 0.02, times=2.0, mad=5.0),
        cell("fast", 0.03, times=9.0),
    ]
    assert front(cells, "decode") == ["best"]


def test_cells_that_were_not_timed_are_on_no_front_of_speed():
    assert front([cell("a", 0.1) | {"speed": None}], "decode") == []
