"""The laws of a step: what is measured, and what follows from it."""
