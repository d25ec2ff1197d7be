"Rows of the table that `evaluate` prints."
import pandas as pd

from calib_prune.cli.evaluate import retention_lines


def test_a_task_with_its_dimensions_name_has_its_own_numbers():
    rows = [("task", "law", 0.5, 0.3), ("dimension", "law", 0.7, 0.4)]
    table = pd.DataFrame(
        [dict(level=level, name=name, retention=value, ci_low=value, ci_high=value, n=9)
         for level, name, value, _ in rows])
    floor = pd.DataFrame([dict(level=level, name=name, floor=low) for level, name, _, low in rows])
    lines = retention_lines(table, floor, {"plain": table})
    assert [line["floor %"].strip() for line in lines] == ["30.0", "40.0"]
    assert [line["plain %"].strip() for line in lines] == ["50.0", "70.0"]
