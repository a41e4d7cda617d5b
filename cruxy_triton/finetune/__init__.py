"""The fine-tuning run: recipe (settings), load (model and LoRA), data, train, report."""
