"""The position in the data."""

from engine.data.sampler import ElasticSampler

__all__ = ["ElasticSampler"]
