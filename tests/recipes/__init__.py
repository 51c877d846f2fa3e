"""Tests of ``recipes/causvid.py`` and of what it uses of ``recipes/lib``."""
