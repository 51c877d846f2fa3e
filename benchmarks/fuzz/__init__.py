"""What ``benchmarks.state_fuzz`` is made of: cases, what they build, an oracle, and the ranks' jobs."""
