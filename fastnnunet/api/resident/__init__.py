"""A bundle that stays in memory and predicts images of strangers one by one: what a service is made of."""

from fastnnunet.api.resident.again import keep_label_map, write_again
from fastnnunet.api.resident.model import PredictedImage, ResidentModel, check_model

__all__ = ["PredictedImage", "ResidentModel", "check_model", "keep_label_map", "write_again"]
