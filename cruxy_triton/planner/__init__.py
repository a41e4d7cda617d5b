"""The memory planner: does this training run fit this card, and which configuration is best?"""
