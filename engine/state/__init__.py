"""Training state as logical tensors: geometry, and the adapters that find it in each engine."""
