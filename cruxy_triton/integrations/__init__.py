"""CruxyOptimizer and the guard in other people's training loops; docs/integrations.md has the line to type for each.

Only Hugging Face's Trainer needs a module (`transformers`): accelerate, Lightning and a plain loop take the optimizer
as it is.
"""
