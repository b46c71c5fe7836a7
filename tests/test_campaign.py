"""The short form of `make campaign`."""

import pytest


@pytest.mark.slow
def test_whatever_happens_a_run_ends_the_same_or_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["campaign.py", "--short"])
    import campaign  # here: it sets the number of threads of all that it starts

    status = campaign.main()
    output, errors = capsys.readouterr()
    assert status == 0, output + errors
    rows = [line.split("|")[1:-1] for line in output.splitlines()[2:]]
    assert len(rows) == 9
    assert all(int(tried) == int(same) + int(refused) > 0 for _, tried, same, refused, _ in rows)
