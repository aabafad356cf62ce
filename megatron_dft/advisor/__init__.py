"""Recommendation of a training objective from a data set and a base model."""
