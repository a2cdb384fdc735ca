"""Freed memory stays with the process once it is told to."""

from tests.unit.training.own_process import number_printed_by

SCRIPT = """
import resource
import numpy as np
from bigray.training.allocator import keep_freed_memory

keep_freed_memory()

def page_faults_of_a_large_array():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**21, dtype=np.float64)  # 16 MiB: 4,096 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults_of_a_large_array()
print(page_faults_of_a_large_array())
"""


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    assert number_printed_by(SCRIPT) < 400
