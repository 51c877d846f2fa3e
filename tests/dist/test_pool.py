"""The ranks that tests share: no job changes what the jobs after it compute."""

from benchmarks.pool import Pool
from tests.dist import jobs


def test_a_job_computes_as_in_a_new_process(tmp_path):
    pool = Pool(1)
    try:
        [first] = pool.run(jobs.how_torch_computes)
        assert first == ("torch._C._nn.linear", 1, False)
        [left] = pool.run(jobs.compute_differently, str(tmp_path))
        assert left == ("deepspeed.runtime.zero.linear.zero3_linear_wrap", 2, True)
        assert pool.run(jobs.how_torch_computes) == [first]
    finally:
        pool.close()
