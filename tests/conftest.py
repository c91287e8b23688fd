"""What tests of every folder may ask for: one thread, a seed."""

import os

import pytest
import torch

# lightning 2.6 itself calls jsonargparse by old names (add_instantiator)
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="module")
def one_thread():
    """Small maps are slower on two threads, and much slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded():
    """Random numbers of a test do not hang on the tests before it."""
    torch.manual_seed(0)
