"""Pools with their operations: of a layer, of a model, and of many sequences at once. Stands on ``operations``."""
