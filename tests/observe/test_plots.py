"""The picture of a run."""

from art_mcp.observe.plots import plot_reward

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_of_any_length_gets_its_picture(tmp_path):
    for steps in (1, 25):
        path = tmp_path / f"{steps}.png"
        plot_reward(path, [{"step": step, "reward": step / 25} for step in range(steps)], title="sums, mine")
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 5000


def test_nothing_is_drawn_of_a_run_without_steps(tmp_path):
    plot_reward(tmp_path / "none.png", [], title="")
    assert list(tmp_path.iterdir()) == []
