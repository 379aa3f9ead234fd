import torch

from quantkit.calibration.duplicates import RUN, duplicates, overlap


def words(start, count=60):
    return " ".join(f"word{i}" for i in range(start, start + count))


def test_equal_and_nearly_equal_documents_are_counted_once_each():
    found = duplicates([words(0), words(100), words(0).upper() + "!", words(10), words(200)])
    assert (found.exact, found.near) == (1, 1)


def test_documents_that_share_less_than_half_are_others():
    assert duplicates([words(0), words(45), words(1000, 3), words(2000, 3)]).near == 0


def test_long_documents_are_compared_by_a_share_of_their_shingles():
    assert duplicates([words(0, 5000), words(1000, 5000), words(10_000, 5000)]).near == 1


def test_repeated_lines_are_those_that_came_before():
    line = "a line of more than forty characters, a footer"
    found = duplicates([f"{line}\nshort\n{line}\n", f"short\n  {line}  \n"])
    assert found.repeated_lines == (len(line) + len(line) + 4) / (3 * len(line) + 14)


def test_overlap_counts_windows_and_the_share_of_the_evaluation():
    evaluation = torch.arange(1000, 1000 + 4 * RUN)
    windows = torch.arange(5 * 64).view(5, 64)
    assert overlap(windows, evaluation).windows == 0
    windows[1, 10 : 10 + RUN] = evaluation[20 : 20 + RUN]
    windows[3, :RUN] = evaluation[3 : 3 + RUN]
    windows[4, : RUN - 1] = evaluation[: RUN - 1]  # too short a run
    found = overlap(windows, evaluation)
    assert (found.windows, found.share) == (2, 2 / (3 * RUN + 1))


def test_a_run_in_another_order_is_another():
    evaluation = torch.arange(RUN)
    assert overlap(evaluation.flip(0)[None], evaluation).windows == 0
    assert overlap(evaluation[None], evaluation).windows == 1
