"""A bundle that stays in memory and predicts images of strangers one by one: what a service is made of."""

from fastnnunet.api.resident.model import PredictedImage, ResidentModel, check_model

__all__ = ["PredictedImage", "ResidentModel", "check_model"]
