"""Where runs of these tests are made, and on how many threads."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Sums over several threads are not the same to the last bit as over one, which is what a child process here has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of one's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path
