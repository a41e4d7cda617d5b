"""The memory planner: does this training run fit this card, and which configuration is best?

from cruxy_triton.planner import plan
answer = plan("tinyllama-1.1b", "gtx1650", max_seq_length=1024)
if answer.fits: print(answer.config)
"""

from cruxy_triton.planner.card import Card, card_names, load_card, parse_bytes
from cruxy_triton.planner.lookup import model_names
from cruxy_triton.planner.models import load_model, shape_from_config
from cruxy_triton.planner.plan import Configuration, Option, Plan
from cruxy_triton.planner.search import plan
from cruxy_triton.planner.shape import ModelShape

__all__ = [
    "Card",
    "Configuration",
    "ModelShape",
    "Option",
    "Plan",
    "card_names",
    "load_card",
    "load_model",
    "model_names",
    "parse_bytes",
    "plan",
    "shape_from_config",
]
