"""The fast loop of an optimizer step: telemetry, control, update. Imports torch and triton only."""
