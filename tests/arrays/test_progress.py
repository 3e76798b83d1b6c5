import time

from scenefit.arrays import progress


def test_quick_work_shows_nothing(capsys):
    assert list(progress.with_progress(range(3), "shapes", True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_slow_work_shows_a_bar_unless_silenced(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.05)

    def work(shown):
        for _ in progress.with_progress(range(4), "shapes", shown):
            time.sleep(0.15)
        return capsys.readouterr().err

    assert "shapes" in work(True)
    assert work(False) == ""
