"""Mirrors engine/: ``tests/plan/test_reads.py`` tests ``engine/plan/reads.py``."""
